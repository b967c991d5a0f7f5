"""Versions of training frameworks that the integrations were written for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from raymix.errors import TrainingError


def require(package: str, versions: str, install: str) -> None:
    """Check that a framework of a known version is installed.

    Called before the framework is imported: in another version the import may fail with a message
    that names neither, or succeed and train something else.

    Args:
        package: Name of the framework's package.
        versions: Versions that are known, such as `>=5,<6`.
        install: Requirement for `pip install` that brings one of them.

    Raises:
        TrainingError: If it is not installed, or of another version.
    """
    fix = f"pip install '{install}'"
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise TrainingError.at(package, None, "not installed", fix=fix) from None
    try:
        # Pre-releases and local builds such as 5.1.0.dev0 and 2.6+cu130 count by their number.
        known = SpecifierSet(versions).contains(installed, prereleases=True)
    except InvalidVersion:
        known = False
    if not known:
        raise TrainingError.at(
            package,
            installed,
            "a version that this integration is not written for",
            allowed=f"it takes {package} {versions}",
            fix=f"{fix}, or use raymix.MixtureLoader by itself",
        )
