"""Blocks from the plane, as one rank gets them: zero-copy views of the object store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.exceptions

from raymix.errors import ClusterError, CorpusError
from raymix.streaming.blocks.block_batch import BlockBatch, from_table
from raymix.streaming.controller.client import get


class PlaneSource:
    """A `BlockSource` on top of the plane's actor.

    Args of the constructor:
        plane: The actor.
        row_tokens: As the plane was given.
        rank: This rank.
        world_size: Ranks that read from the plane.
        patience_s: How long a block may take to come.
    """

    def __init__(
        self,
        plane: Any,
        *,
        row_tokens: int,
        rank: int,
        world_size: int,
        patience_s: float = 300.0,
    ) -> None:
        self._plane = plane
        self._row_tokens = row_tokens
        self._rank, self._world_size = rank, world_size
        self._patience_s = patience_s
        self._missing: set[int] = set()
        self._pending: Any = None
        self._errors: dict[int, str] = {}
        about = self._get(plane.describe.remote(), patience_s)
        self.budget_bytes: int = about["budget_bytes"]

    def want(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        """Tell the plane what is needed next, and ask for what is not at hand."""
        self._missing = set(missing)
        self._plane.want.remote(
            self._rank,
            self._world_size,
            step,
            np.array(numbers, dtype=np.int64),
            np.array(steps, dtype=np.float64),
        )
        if self._pending is None:
            self._ask()

    def arrived(self) -> list[BlockBatch]:
        """Return what has come of the wanted blocks since the last call, without waiting."""
        if self._pending is None or not ray.wait([self._pending], timeout=0)[0]:
            return []
        pending, self._pending = self._pending, None
        slabs = self._load(self._get(pending, self._patience_s), list(self._missing))
        self._ask()
        return slabs

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        """Return slabs that hold these blocks, waiting for them.

        Raises:
            CorpusError: If one is corrupt; it names the file and the block.
            ClusterError: If they do not come within the time limit.
        """
        deadline = time.monotonic() + self._patience_s
        left = dict.fromkeys(numbers)
        slabs: list[BlockBatch] = []
        while left:
            self._raise_corrupt(left)
            wait = deadline - time.monotonic()
            if wait <= 0:
                raise self._too_late(list(left))
            wanted = list(left)
            asked = self._plane.take.remote(np.array(wanted, dtype=np.int64), urgent=True)
            for slab in self._load(self._get(asked, wait), wanted):
                slabs.append(slab)
                for number in slab.numbers:
                    left.pop(number, None)
        return slabs

    def _ask(self) -> None:
        if self._missing:
            wanted = np.fromiter(self._missing, dtype=np.int64)
            self._pending = self._plane.take.remote(wanted, urgent=False)

    def _load(self, refs: Sequence[Any], wanted: Sequence[int]) -> list[BlockBatch]:
        """Return the slabs behind `refs`; none if objects were lost, which the plane is told."""
        try:
            tables = ray.get(list(refs), timeout=self._patience_s)
        except ray.exceptions.ObjectLostError:
            # They vanished with the plane that owned them, or with a node: it can load them again.
            self._plane.forget.remote(list(wanted))
            return []
        except ray.exceptions.GetTimeoutError as error:
            raise self._too_late(wanted) from error
        slabs = []
        for table in tables:
            slab, errors = from_table(table, self._row_tokens)
            self._errors |= errors
            self._missing.difference_update(slab.numbers, errors)
            slabs.append(slab)
        return slabs

    def _raise_corrupt(self, numbers: dict[int, None]) -> None:
        corrupt = [number for number in numbers if number in self._errors]
        if corrupt:
            # Read anew should anybody ask again: the file may have been mended.
            self._plane.forget.remote(corrupt)
            raise CorpusError(*dict.fromkeys(self._errors.pop(number) for number in corrupt))

    def _too_late(self, numbers: Sequence[int]) -> ClusterError:
        return ClusterError.at(
            "blocks",
            list(numbers)[:8],
            f"they did not come within {self._patience_s:g} s",
            fix="Is the object store full, or the storage slow?",
        )

    def _get(self, answer: Any, timeout_s: float) -> Any:
        return get(answer, timeout_s=timeout_s, what="the block plane")
