"""Environment of a run: versions, machine and code revision; written beside its results."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

from raymix.training.host.machine import cores, memory

_PACKAGES = ("raymix", "ray", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


def environment(**more: object) -> dict[str, object]:
    """Return the environment as a document of JSON types, with `more` appended."""
    return {
        # With the zone: a run that is resumed elsewhere has starts in several.
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": cores(),
        "memory_bytes": memory()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "revision": _revision(),
        **more,
    }


def raymix_version() -> str:
    """Return the installed version of raymix."""
    return _version("raymix") or "of a source tree"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Return the commit of the working directory's repository, with `-dirty` if files differ."""
    # No repository and no git are the common cases of an installed package, so neither is an error.
    # The time limit is for repositories on network file systems.
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
