"""Imports of modules that a user names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Let modules of the working directory be imported, as `python -m` does."""
    # Console scripts, unlike `python -m`, do not have the working directory on the path.
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.pop(0)
