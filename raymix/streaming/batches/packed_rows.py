"""Packed mode: turns a plan of rows into batches, many steps at a time.

Where the rows of a chunk of steps lie is looked up for all of them at once. They are copied out of
their slabs some steps at a time, slab by slab: that costs a few calls per slab instead of several
per row. A step's batch is then picked from this buffer, which is small enough to be in cache.
Letters: S steps, B rows of the global batch, R of them this rank's, N = S B rows of the chunk,
M rows of this rank in the buffer, L tokens per row, D domains.
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

# Bytes of rows copied together: half of a core's second-level cache, about.
_BUFFER_BYTES = 1 << 20


def rank_rows(rows: int, rank: int, world_size: int) -> slice:
    """Return which of a global batch's rows belong to a rank: equal parts, in order."""
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


class PackedChunk:
    """Consecutive steps for one rank; see `raymix.streaming.batches.builder.Chunk`."""

    def __init__(
        self,
        plan: PlanChunk,
        slot_SB: Ints,
        columns: slice,
        found: RowLocations,
        shares: Mapping[int, Floats],
        planner: PackedPlanner,
    ) -> None:
        """Copy nothing yet.

        Args:
            plan: What was planned.
            slot_SB: Number of each row among those found.
            columns: This rank's rows of a batch.
            found: Where the rows lie.
            shares: Shares asked for, by version of the mixture log, shape (D,) each.
            planner: Works out states again; not the one that goes on planning.
        """
        self.first = plan.first_step
        self.end = plan.first_step + plan.n_steps
        self._plan = plan
        self._planner = planner
        self._slot_SB = slot_SB
        self._columns = columns
        self._found = found
        self._shares = shares
        self._versions: list[int] = plan.version_S.tolist()
        self._domain_SR = plan.domain_SB[:, columns]
        self._mine_SR = slot_SB[:, columns]
        step_bytes = max(1, self._mine_SR.shape[1] * found.row_bytes)
        self._together = max(1, _BUFFER_BYTES // step_bytes)
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
            self._rows_ML.take(self._pick_SR[at - self._gathered.start], axis=0),
            self._domain_SR[at],
            self,
        )

    def _gather(self, at: int) -> None:
        """Copy the rows of the steps from `at` on, as many as fit the buffer."""
        self._gathered = range(at, min(at + self._together, len(self._mine_SR)))
        slot_M = self._mine_SR[at : self._gathered.stop].ravel()
        order_M = slot_M.argsort()
        pick_M = np.empty_like(order_M)
        pick_M[order_M] = np.arange(order_M.size)
        self._pick_SR = pick_M.reshape(-1, self._mine_SR.shape[1])
        if self._buffer_ML is None:
            self._buffer_ML = self._found.buffer(slot_M.size)
        self._rows_ML = self._buffer_ML[: slot_M.size]
        self._found.gather(slot_M[order_M], self._rows_ML)

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the planner's state before `step`."""
        return self._planner.state_at(self._plan, step)

    def batch_hash(self, step: int) -> str:
        """Return the name of the whole batch of a step."""
        return self._plan.batch_hash(step)

    def label_tokens(self, step: int) -> int:
        """Return the labels of the whole batch of a step."""
        return self._label_tokens_S[step - self.first]

    def row_starts(self, step: int) -> RowStarts:
        """Return where documents begin in the rank's rows of a step."""
        offset_M, positions = self._starts
        rows = self._domain_SR.shape[1]
        first = (step - self.first) * rows
        offset_R = offset_M[first : first + rows + 1]
        return offset_R - offset_R[0], positions[offset_R[0] : offset_R[-1]]

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the whole batch of a step."""
        return self._plan.counts_SD[step - self.first] * self._found.row_tokens

    @cached_property
    def _label_tokens_S(self) -> list[int]:
        labels: list[int] = self._found.labels_N[self._slot_SB].sum(axis=1).tolist()
        return labels

    @cached_property
    def _starts(self) -> RowStarts:
        return self._found.starts(self._slot_SB[:, self._columns].ravel())


class RowLocations:
    """The slabs that hold the rows of a chunk; rows in the order of their slabs."""

    def __init__(self, slabs: list[BlockBatch], edges: list[int], row_N: Ints) -> None:
        self._slabs = slabs
        self._edges = edges
        self._row_N = row_N
        self.size = len(row_N)
        like = slabs[0].rows_NL
        self.row_tokens, self.row_bytes = like.shape[1], like.shape[1] * like.itemsize

    def buffer(self, rows: int) -> Tokens:
        """Return room for that many rows, shape (rows, L)."""
        return np.empty((rows, self.row_tokens), dtype=self._slabs[0].rows_NL.dtype)

    def gather(self, rows_M: Ints, out_ML: Tokens) -> None:
        """Copy the rows numbered by `rows_M`, sorted, to `out_ML`, shape (M, L)."""
        edges = np.searchsorted(rows_M, self._edges).tolist()
        row_M = self._row_N[rows_M]
        for slab, (first, end) in zip(self._slabs, pairwise(edges), strict=True):
            if first < end:
                # `clip` spares a buffer: the rows are known to be there.
                slab.rows_NL.take(row_M[first:end], axis=0, out=out_ML[first:end], mode="clip")

    @cached_property
    def labels_N(self) -> Ints:
        """Return the labels of each row, shape (N,)."""
        return np.concatenate([slab.labels_N[rows_K] for slab, rows_K in self._parts()])

    def starts(self, slot_M: Ints) -> RowStarts:
        """Return where documents begin in the rows `slot_M`: offsets (M + 1,) and positions."""
        count_N = np.empty(self.size, dtype=np.int64)
        first_N = np.empty(self.size, dtype=np.int64)
        pieces: list[Ints] = []
        before = done = 0
        for slab, rows_K in self._parts():
            ranges_K = slab.start_range[rows_K], slab.start_range[rows_K + 1]
            counts_K = ranges_K[1] - ranges_K[0]
            pieces.append(slab.offsets[ranges(ranges_K[0], counts_K)])
            part = slice(done, done + len(rows_K))
            count_N[part] = counts_K
            first_N[part] = before + np.cumsum(counts_K) - counts_K
            before += len(pieces[-1])
            done += len(rows_K)
        count_M = count_N[slot_M]
        positions = np.concatenate(pieces)[ranges(first_N[slot_M], count_M)]
        return np.concatenate([[0], np.cumsum(count_M)]), positions

    def _parts(self) -> list[tuple[BlockBatch, Ints]]:
        parts = zip(self._slabs, pairwise(self._edges), strict=True)
        return [(slab, self._row_N[first:end]) for slab, (first, end) in parts]


def ranges(first_N: Ints, count_N: Ints) -> Ints:
    """Return first, first + 1, ..., first + count - 1 of each, one after the other."""
    total = np.cumsum(count_N)
    return np.repeat(first_N - (total - count_N), count_N) + np.arange(
        total[-1] if len(total) else 0
    )


def locate_rows(
    plan: PlanChunk,
    ahead: UpcomingSamples,
    table: BlockTable,
    *,
    first_block_D: Ints,
    row_tokens: int,
) -> tuple[RowLocations, Ints]:
    """Return the rows of a plan, and the number of each among them, shape (S, B).

    Raises:
        CorpusError: If a block is corrupt; it names the file and the block.
    """
    count_D = plan.counts_SD.sum(axis=0)
    used = np.flatnonzero(count_D)
    before_D = plan.start.count_D
    spans = {
        domain: (before, before + count)
        for domain, before, count in zip(
            used.tolist(), before_D[used].tolist(), count_D[used].tolist(), strict=True
        )
    }
    located = ahead.locate(spans)
    # Domain after domain: sample n of a domain is row n + shift of all of them.
    shift_D = np.zeros(len(count_D), dtype=np.int64)
    shift_D[used] = np.cumsum(count_D[used]) - count_D[used] - before_D[used]
    place_SB = plan.index_SB + shift_D[plan.domain_SB]
    number_N = np.concatenate([group_N for group_N, _ in located])
    number_N = number_N + np.repeat(first_block_D[used], count_D[used])
    slab_N, token_N = table.find(number_N)
    row_N = token_N // row_tokens + np.concatenate([unit_N for _, unit_N in located])
    order_N = np.argsort(slab_N, kind="stable")
    slab_N = slab_N[order_N]
    first = np.concatenate([[0], np.flatnonzero(np.diff(slab_N)) + 1])
    slabs = [table.slab(key) for key in slab_N[first].tolist()]
    slot_N = np.empty_like(order_N)
    slot_N[order_N] = np.arange(order_N.size)
    return RowLocations(slabs, [*first.tolist(), order_N.size], row_N[order_N]), slot_N[place_SB]
