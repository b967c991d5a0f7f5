"""Block source of one rank on top of the block plane: zero-copy views of the object store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.exceptions

from raymix.errors import ClusterLostError, CorpusError
from raymix.streaming.blocks.block_batch import BlockBatch, from_table
from raymix.streaming.controller.client import get_result

_MAX_REPORTED_BLOCKS = 8


class PlaneSource:
    """A `BlockSource` on top of the plane's actor.

    Args of the constructor:
        plane: The actor.
        row_tokens: The `row_tokens` that the plane was given.
        rank: This rank.
        world_size: Ranks that read from the plane.
        timeout_s: Time limit of a block, seconds.
    """

    def __init__(
        self,
        plane: Any,
        *,
        row_tokens: int,
        rank: int,
        world_size: int,
        timeout_s: float = 300.0,
    ) -> None:
        self._plane = plane
        self._row_tokens = row_tokens
        self._rank, self._world_size = rank, world_size
        self._timeout_s = timeout_s
        self._missing: set[int] = set()
        # The call for prefetched blocks that is under way; at most one, whatever is missing.
        self._pending: Any = None
        self._errors: dict[int, str] = {}
        description = self._get(plane.describe.remote(), timeout_s)
        self.budget_bytes: int = description["budget_bytes"]

    def prefetch(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        """Tell the plane which blocks are needed next, and request the missing ones."""
        self._missing = set(missing)
        # Arrays: Ray serializes them as one buffer, a list element by element.
        self._plane.prefetch.remote(
            self._rank,
            self._world_size,
            step,
            np.array(numbers, dtype=np.int64),
            np.array(steps, dtype=np.float64),
        )
        if self._pending is None:
            self._request_missing()

    def poll(self) -> list[BlockBatch]:
        """Return the prefetched blocks that arrived since the last call, without waiting."""
        if self._pending is None or not ray.wait([self._pending], timeout=0)[0]:
            return []
        pending, self._pending = self._pending, None
        batches = self._load(self._get(pending, self._timeout_s), list(self._missing))
        self._request_missing()
        return batches

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        """Return batches that contain these blocks, waiting for them.

        Raises:
            CorpusError: If a block is corrupt; it names the file and the block.
            ClusterLostError: If they do not arrive within the time limit.
        """
        deadline = time.monotonic() + self._timeout_s
        # A dict as an ordered set: the plane loads in the order of the request.
        remaining = dict.fromkeys(numbers)
        batches: list[BlockBatch] = []
        # Several calls: each returns as soon as the plane has any of the blocks.
        while remaining:
            self._raise_corrupt(remaining)
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise self._timeout_error(list(remaining))
            requested = list(remaining)
            answer = self._plane.get_refs.remote(np.array(requested, dtype=np.int64), urgent=True)
            for batch in self._load(self._get(answer, seconds_left), requested):
                batches.append(batch)
                for number in batch.numbers:
                    remaining.pop(number, None)
        return batches

    def _request_missing(self) -> None:
        if self._missing:
            missing = np.fromiter(self._missing, dtype=np.int64)
            self._pending = self._plane.get_refs.remote(missing, urgent=False)

    def _load(self, refs: Sequence[Any], requested: Sequence[int]) -> list[BlockBatch]:
        """Return the batches behind `refs`; none if objects were lost, which the plane is told."""
        try:
            tables = ray.get(list(refs), timeout=self._timeout_s)
        except ray.exceptions.ObjectLostError:
            # Objects vanish with their owner (a plane that restarted) or with a node. The plane can
            # read the blocks again.
            self._plane.drop.remote(list(requested))
            return []
        except ray.exceptions.GetTimeoutError as error:
            raise self._timeout_error(requested) from error
        batches = []
        for table in tables:
            batch, errors = from_table(table, self._row_tokens)
            # Raised by `fetch`, when a step needs the block: a block that was only prefetched may
            # belong to a domain that is never read.
            self._errors |= errors
            self._missing.difference_update(batch.numbers, errors)
            batches.append(batch)
        return batches

    def _raise_corrupt(self, numbers: dict[int, None]) -> None:
        corrupt = [number for number in numbers if number in self._errors]
        if corrupt:
            # Dropped, so that a retry reads them again: the file may have been repaired.
            self._plane.drop.remote(corrupt)
            raise CorpusError(*dict.fromkeys(self._errors.pop(number) for number in corrupt))

    def _timeout_error(self, numbers: Sequence[int]) -> ClusterLostError:
        return ClusterLostError.at(
            "blocks",
            list(numbers)[:_MAX_REPORTED_BLOCKS],
            f"they did not arrive within {self._timeout_s:g} s",
            fix="Is the object store full, or the storage slow?",
        )

    def _get(self, answer: Any, timeout_s: float) -> Any:
        return get_result(answer, timeout_s=timeout_s, actor="the block plane")
