"""Merging models of one architecture, tensor by tensor; the package itself can be called.

`raymix.merge(source, out)` is `raymix.merge.engine.merge(source, out)`: it reads a merge file
(`recipe`), plans every parameter (`plan`), runs one job per parameter on threads or as Ray tasks
(`engine`, `fanout`) and writes the files in place (`output`). A method is a function
`(base, deltas, options) -> delta` registered by `@merge_method` (`registry`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from raymix.merge import drm, entrywise, spectral, spherical
from raymix.merge.engine import merge
from raymix.merge.recipe import MergeFile, ModelEntry, Rule, load_merge
from raymix.merge.registry import (
    Deltas,
    Factors,
    Merged,
    MergeMethod,
    Options,
    PerModel,
    get_method,
    known_methods,
    merge_method,
)

__all__ = [
    "Deltas",
    "Factors",
    "MergeFile",
    "MergeMethod",
    "Merged",
    "ModelEntry",
    "Options",
    "PerModel",
    "Rule",
    "drm",
    "entrywise",
    "get_method",
    "known_methods",
    "load_merge",
    "merge",
    "merge_method",
    "spectral",
    "spherical",
]


class _Callable(ModuleType):
    """A package that merges when it is called, so that the public name can be `raymix.merge`."""

    def __call__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any] | MergeFile,
        out: str | os.PathLike[str],
        **how: Any,
    ) -> dict[str, Any]:
        """Return what a merge came to; see `raymix.merge.engine.merge`."""
        return merge(source, out, **how)


sys.modules[__name__].__class__ = _Callable
