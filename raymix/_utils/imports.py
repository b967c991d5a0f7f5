"""Imports of modules that a user names, and of large libraries."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
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


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection while large libraries are imported.

    It would find nothing to free, and take a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_modules(modules: Sequence[str]) -> None:
    """Import modules by name, without garbage collection meanwhile."""
    with collection_paused():
        for name in modules:
            importlib.import_module(name)
