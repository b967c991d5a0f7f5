"""What a run ran on: versions, machine, code revision; written beside its results."""

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
    """Return the environment as a JSON-able document, with `more` appended."""
    return {
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
    """Return the version of raymix that is installed."""
    return _version("raymix") or "of a source tree"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Return the commit of the working directory's repository, `-dirty` if files differ."""
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
