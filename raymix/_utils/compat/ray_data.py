"""Private API of Ray Data, read in Ray 2.60."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray import ObjectRef
from ray.data import Dataset


def block_references(dataset: Dataset) -> Iterator[ObjectRef[Any]]:
    """Yield the reference of each block of a dataset, in order, as execution produces it.

    The public iterators fetch the blocks into this process; the block plane only passes
    references on, so that tokens never travel through it.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield entry.ref
