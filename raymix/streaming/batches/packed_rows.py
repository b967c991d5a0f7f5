"""Packed rows: a plan of rows turned into batches, many steps at a time.

The rows of a chunk of steps are located all at once. They are copied from their block batches to
a buffer, several steps at a time, block batch by block batch: that costs a few calls per block
batch instead of several per row. A step's rows are then taken from this buffer, which fits into
the cache. A row's *slot* is its index in the chunk's rows ordered by block batch.
Letters: S steps, B rows of the global batch, R of them this rank's, N = S B rows of the chunk,
M rows of this rank in the buffer, K rows of one block batch, L tokens per row, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from raymix.sampling import PackedPlanner, PlanChunk
from raymix.streaming.batches.step_batch import RowStarts, StepBatch
from raymix.streaming.batches.table import BlockTable
from raymix.streaming.batches.upcoming_samples import UpcomingSamples
from raymix.streaming.blocks.block_batch import BlockBatch, Ints, Tokens

Floats = npt.NDArray[np.float64]

# Rows copied together: about half of a core's second-level cache, as they are read again at once.
_BUFFER_BYTES = 1 << 20


def rank_rows(rows: int, rank: int, world_size: int) -> slice:
    """Return the rows of a global batch that a rank reads: equal parts, in order."""
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


class PackedChunk:
    """Consecutive steps for one rank; see `raymix.streaming.batches.builder.Chunk`."""

    def __init__(
        self,
        plan: PlanChunk,
        slot_SB: Ints,
        columns: slice,
        locations: RowLocations,
        shares: Mapping[int, Floats],
        planner: PackedPlanner,
    ) -> None:
        """Store the plan; rows are copied when a batch is requested.

        Args:
            plan: The planned rows.
            slot_SB: Slot of each row in `locations`.
            columns: This rank's rows of a batch.
            locations: Block batch and row in it of each slot.
            shares: Shares by version of the mixture log, shape (D,) each.
            planner: Recomputes past states; not the planner that goes on planning.
        """
        self.first = plan.first_step
        self.end = plan.first_step + plan.n_steps
        self._plan = plan
        self._planner = planner
        self._slot_SB = slot_SB
        self._columns = columns
        self._locations = locations
        self._shares = shares
        self._versions: list[int] = plan.version_S.tolist()
        self._domain_SR = plan.domain_SB[:, columns]
        self._slot_SR = slot_SB[:, columns]
        step_bytes = max(1, self._slot_SR.shape[1] * locations.row_bytes)
        self._buffer_steps = max(1, _BUFFER_BYTES // step_bytes)
        # Steps of the chunk whose rows are in the buffer.
        self._gathered = range(0)
        self._buffer_ML: Tokens | None = None

    def batch(self, step: int) -> StepBatch:
        """Return the batch of one of the steps."""
        at = step - self.first
        if at not in self._gathered:
            self._gather(at)
        version = self._versions[at]
        return StepBatch(
            step,
            version,
            self._shares[version],
            self._plan.counts_SD[at],
            self,
            # A copy, so that the batch stays valid when the buffer is filled again.
            self._rows_ML.take(self._buffer_row_SR[at - self._gathered.start], axis=0),
            self._domain_SR[at],
            self,
        )

    def _gather(self, at: int) -> None:
        """Copy the rows of the steps from `at` on to the buffer, as many as fit."""
        self._gathered = range(at, min(at + self._buffer_steps, len(self._slot_SR)))
        slot_M = self._slot_SR[at : self._gathered.stop].ravel()
        # Sorted by slot, the rows of a block batch are adjacent: one call copies them.
        order_M = slot_M.argsort()
        buffer_row_M = np.empty_like(order_M)
        buffer_row_M[order_M] = np.arange(order_M.size)
        self._buffer_row_SR = buffer_row_M.reshape(-1, self._slot_SR.shape[1])
        # Allocated once per chunk: fresh pages would cost a page fault per 4 kB in each fill.
        if self._buffer_ML is None:
            self._buffer_ML = self._locations.buffer(slot_M.size)
        self._rows_ML = self._buffer_ML[: slot_M.size]
        self._locations.gather(slot_M[order_M], self._rows_ML)

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the planner's state before `step`."""
        return self._planner.state_at(self._plan, step)

    def batch_hash(self, step: int) -> str:
        """Return the hash of the global batch of a step."""
        return self._plan.batch_hash(step)

    def label_tokens(self, step: int) -> int:
        """Return the number of labels in the global batch of a step."""
        return self._label_tokens_S[step - self.first]

    def row_starts(self, step: int) -> RowStarts:
        """Return offsets and positions of the documents' starts in this rank's rows of a step."""
        offset_M, positions = self._starts
        rows = self._domain_SR.shape[1]
        first = (step - self.first) * rows
        offset_R = offset_M[first : first + rows + 1]
        return offset_R - offset_R[0], positions[offset_R[0] : offset_R[-1]]

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the global batch of a step, shape (D,)."""
        return self._plan.counts_SD[step - self.first] * self._locations.row_tokens

    @cached_property
    def _label_tokens_S(self) -> list[int]:
        labels: list[int] = self._locations.labels_N[self._slot_SB].sum(axis=1).tolist()
        return labels

    @cached_property
    def _starts(self) -> RowStarts:
        return self._locations.starts(self._slot_SB[:, self._columns].ravel())


class RowLocations:
    """Block batch and row in it of each row of a chunk; slots are ordered by block batch."""

    def __init__(self, batches: list[BlockBatch], edges: list[int], row_N: Ints) -> None:
        """Store the locations.

        Args:
            batches: The block batches.
            edges: First slot of each block batch, then N.
            row_N: Row within its block batch of each slot.
        """
        self._batches = batches
        self._edges = edges
        self._row_N = row_N
        self.size = len(row_N)
        like = batches[0].rows_NL
        self.row_tokens, self.row_bytes = like.shape[1], like.shape[1] * like.itemsize

    def buffer(self, rows: int) -> Tokens:
        """Return an uninitialized buffer, shape (rows, L)."""
        return np.empty((rows, self.row_tokens), dtype=self._batches[0].rows_NL.dtype)

    def gather(self, slot_M: Ints, out_ML: Tokens) -> None:
        """Copy the rows of the slots `slot_M`, sorted, to `out_ML`, shape (M, L)."""
        edges = np.searchsorted(slot_M, self._edges).tolist()
        row_M = self._row_N[slot_M]
        for batch, (first, end) in zip(self._batches, pairwise(edges), strict=True):
            if first < end:
                # With the default mode, "raise", numpy copies to a temporary buffer before `out`.
                batch.rows_NL.take(row_M[first:end], axis=0, out=out_ML[first:end], mode="clip")

    @cached_property
    def labels_N(self) -> Ints:
        """Return the number of labels of each row, shape (N,)."""
        return np.concatenate([batch.labels_N[row_K] for batch, row_K in self._parts()])

    def starts(self, slot_M: Ints) -> RowStarts:
        """Return the documents' starts in the rows `slot_M`: offsets (M + 1,) and positions."""
        count_N = np.empty(self.size, dtype=np.int64)
        first_N = np.empty(self.size, dtype=np.int64)
        # For all slots and not only `slot_M`: a pass by block batch needs no search.
        positions: list[Ints] = []
        n_positions = n_rows = 0
        for batch, row_K in self._parts():
            first_K, end_K = batch.start_range[row_K], batch.start_range[row_K + 1]
            count_K = end_K - first_K
            positions.append(batch.offsets[ranges(first_K, count_K)])
            part = slice(n_rows, n_rows + len(row_K))
            count_N[part] = count_K
            first_N[part] = n_positions + np.cumsum(count_K) - count_K
            n_positions += len(positions[-1])
            n_rows += len(row_K)
        count_M = count_N[slot_M]
        position_S = np.concatenate(positions)[ranges(first_N[slot_M], count_M)]
        return np.concatenate([[0], np.cumsum(count_M)]), position_S

    def _parts(self) -> list[tuple[BlockBatch, Ints]]:
        parts = zip(self._batches, pairwise(self._edges), strict=True)
        return [(batch, self._row_N[first:end]) for batch, (first, end) in parts]


def ranges(first_N: Ints, count_N: Ints) -> Ints:
    """Return the concatenation of the ranges [first, first + count)."""
    # One arange, shifted range by range: a loop over ranges would cost a call each.
    total = np.cumsum(count_N)
    return np.repeat(first_N - (total - count_N), count_N) + np.arange(
        total[-1] if len(total) else 0
    )


def locate_rows(
    plan: PlanChunk,
    upcoming: UpcomingSamples,
    table: BlockTable,
    *,
    first_block_D: Ints,
    row_tokens: int,
) -> tuple[RowLocations, Ints]:
    """Return the locations of a plan's rows, and the slot of each row, shape (S, B).

    Raises:
        CorpusError: If a block is corrupt; it names the file and the block.
    """
    count_D = plan.counts_SD.sum(axis=0)
    domains = np.flatnonzero(count_D)
    before_D = plan.start.count_D
    spans = {
        domain: (before, before + count)
        for domain, before, count in zip(
            domains.tolist(), before_D[domains].tolist(), count_D[domains].tolist(), strict=True
        )
    }
    located = upcoming.locate(spans)
    # N is ordered by domain, then by sample: sample n of a domain is at n + shift.
    shift_D = np.zeros(len(count_D), dtype=np.int64)
    shift_D[domains] = np.cumsum(count_D[domains]) - count_D[domains] - before_D[domains]
    index_SB = plan.index_SB + shift_D[plan.domain_SB]
    number_N = np.concatenate([group_N for group_N, _ in located])
    number_N = number_N + np.repeat(first_block_D[domains], count_D[domains])
    key_N, token_N = table.find(number_N)
    # Blocks are cut to whole rows, so the first token of each is at a multiple of L.
    row_N = token_N // row_tokens + np.concatenate([unit_N for _, unit_N in located])
    # Stable: rows of a batch stay in sample order, which numpy's default sort does not promise.
    order_N = np.argsort(key_N, kind="stable")
    key_N = key_N[order_N]
    first = np.concatenate([[0], np.flatnonzero(np.diff(key_N)) + 1])
    batches = [table.batch(key) for key in key_N[first].tolist()]
    slot_N = np.empty_like(order_N)
    slot_N[order_N] = np.arange(order_N.size)
    locations = RowLocations(batches, [*first.tolist(), order_N.size], row_N[order_N])
    return locations, slot_N[index_SB]
