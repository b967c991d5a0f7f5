"""Costs of many micro-batches at once, and LPT assignment of sequences to slots for given widths.

Everything here works on B micro-batches of groups of the same size side by side, so that they share
numpy's overhead per call; shorter ones are padded with sequences of length 0.

Legend: B micro-batches, K sequences in the longest of them, N ranks of a group, T slots (see
`Slots`), W widths of the layout; X width rules tried per micro-batch, C = B X. The level of a
sequence is the index of its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.layout import Floats, Ints, Layout, Slots


@dataclass(frozen=True, slots=True)
class CostTables:
    """Costs of the sequences of B micro-batches at each width."""

    length_BK: Ints
    """Tokens, longest first, 0 for padding."""
    attention_BKW: Floats
    """Seconds on each rank of a CP group."""
    shard_tokens_BKW: Ints
    """Tokens on each rank of a CP group."""
    slots: Slots
    widths: Ints
    latency_W: Floats
    """Seconds per collective; 0 for width 1."""
    token_W: Floats
    """Seconds per token gathered; 0 for width 1."""
    cost: CostModel

    @classmethod
    def of(cls, parts: Sequence[Ints], layout: Layout, cost: CostModel) -> CostTables:
        """Return the tables of micro-batches, each given by its lengths, longest first."""
        n_sequences = max((part.size for part in parts), default=0)
        length_BK = np.zeros((len(parts), n_sequences), dtype=np.int64)
        for row, part in zip(length_BK, parts, strict=True):
            row[: part.size] = part
        widths = np.array(layout.widths, dtype=np.int64)
        links = [cost.link(width) for width in layout.widths]
        return cls(
            length_BK,
            cost.attention(length_BK[:, :, None], widths),
            shard_tokens(length_BK[:, :, None], widths),
            layout.slots,
            widths,
            np.array([link.latency_s for link in links]),
            np.array([link.token_s for link in links]),
            cost,
        )

    def rows(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> CostTables:
        """Return the tables of the micro-batches selected by `index`."""
        return CostTables(
            self.length_BK[index],
            self.attention_BKW[index],
            self.shard_tokens_BKW[index],
            self.slots,
            self.widths,
            self.latency_W,
            self.token_W,
            self.cost,
        )


@dataclass(frozen=True, slots=True)
class Loads:
    """Work of the ranks of B micro-batches: the terms of eq. (1) of `cost.model`."""

    local_BN: Floats
    """Seconds of attention of local sequences."""
    sharded_BN: Floats
    """Seconds of attention of shards."""
    gather_BN: Floats
    """Seconds of communication."""
    tokens_BN: Floats

    @classmethod
    def of(cls, tables: CostTables, slot_BK: Ints) -> Loads:
        """Return the loads of an assignment (-1: padding)."""
        slots, n_rows, n_slots = tables.slots, slot_BK.shape[0], tables.slots.width_T.size
        # An extra slot for padding, which covers no rank and is cut off again.
        slot_BK = np.where(slot_BK < 0, n_slots, slot_BK)
        level_BK = np.append(slots.level_T, 0)[slot_BK]
        # One bincount over (row, slot) cells is faster than scatter-adds (np.add.at) per row.
        cell = (slot_BK + np.arange(n_rows)[:, None] * (n_slots + 1)).ravel()
        table_index = np.arange(cell.size) * tables.widths.size + level_BK.ravel()

        def per_slot(value: Floats | Ints) -> Floats:
            sums: Floats = np.bincount(cell, value, n_rows * (n_slots + 1)).astype(np.float64)
            return sums.reshape(n_rows, n_slots + 1)[:, :n_slots]

        attention_BT = per_slot(tables.attention_BKW.ravel()[table_index])
        tokens_BT = per_slot(tables.shard_tokens_BKW.ravel()[table_index])
        volume_BT = per_slot(tables.length_BK.ravel())
        gather_BT = volume_BT * tables.token_W[slots.level_T]
        # The sequences of a slot travel in one collective: one latency.
        gather_BT += (volume_BT > 0) * tables.latency_W[slots.level_T]
        n_ranks = slots.covers_TN.shape[1]
        # The first N slots are the single ranks, so they need no product with covers_TN.
        return cls(
            attention_BT[:, :n_ranks],
            attention_BT[:, n_ranks:] @ slots.covers_TN[n_ranks:],
            gather_BT[:, n_ranks:] @ slots.covers_TN[n_ranks:],
            tokens_BT @ slots.covers_TN,
        )

    def seconds(self, cost: CostModel) -> Floats:
        """Return the time of every rank, shape (B, N)."""
        busy = np.maximum(self.gather_BN, self.local_BN)
        return busy + self.sharded_BN + cost.linear(self.tokens_BN)


def assign_by_rules(tables: CostTables, level_BXK: Ints) -> tuple[Ints, Floats]:
    """Return the fastest assignment of each micro-batch, (B, K), and its time, (B,).

    Args:
        tables: Costs of the micro-batches.
        level_BXK: Level of each sequence by each width rule; see `rules`.
    """
    n_rows, n_rules, _ = level_BXK.shape
    repeated = tables.rows(np.repeat(np.arange(n_rows), n_rules))
    slot_CK = _assign(repeated, level_BXK.reshape(n_rows * n_rules, -1))
    second_C = Loads.of(repeated, slot_CK).seconds(tables.cost).max(axis=1)
    # -1 marks padding and, in all columns of a row, a rule that did not fit.
    unassigned = (slot_CK < 0) & (repeated.length_BK > 0)
    second_C[unassigned.any(axis=1)] = np.inf
    second_BX = second_C.reshape(n_rows, n_rules)
    row, best_B = np.arange(n_rows), second_BX.argmin(axis=1)
    return slot_CK.reshape(level_BXK.shape)[row, best_B], second_BX[row, best_B]


def _assign(tables: CostTables, level_CK: Ints) -> Ints:
    """Return the slot of every sequence given its level, (C, K); -1 in a whole row: no capacity.

    Row by row in plain Python: a heap of few ranks is faster than numpy on every row at once.
    """
    row, column = np.ogrid[: level_CK.shape[0], : level_CK.shape[1]]
    tokens_CK = tables.shard_tokens_BKW[row, column, level_CK]
    load_CK = tables.attention_BKW[row, column, level_CK] + tables.cost.linear_s * tokens_CK
    # An upper bound: each sequence as if it paid its own latency and nothing overlapped.
    load_CK += tables.latency_W[level_CK] + tables.token_W[level_CK] * tables.length_BK
    count_C = np.count_nonzero(tables.length_BK, axis=1)
    slot_CK = np.full(level_CK.shape, -1)
    columns = (count_C, level_CK, tokens_CK, load_CK, slot_CK)
    for count, level_K, tokens_K, load_K, slot_K in zip(*columns, strict=True):
        # tolist: Python arithmetic on numpy scalars takes several times as long.
        assigned = _GroupLoads(tables).assign(
            level_K[:count].tolist(), tokens_K[:count].tolist(), load_K[:count].tolist()
        )
        if assigned is not None:
            slot_K[:count] = assigned
    return slot_CK


class _GroupLoads:
    """State of LPT: tokens and seconds of work of the ranks of one group."""

    def __init__(self, tables: CostTables) -> None:
        self._widths = tables.widths.tolist()
        self._n_ranks = tables.slots.covers_TN.shape[1]
        self._group_slot = tables.slots.width_T.size - 1
        self._capacity = tables.cost.memory_tokens
        self._tokens = [0] * self._n_ranks
        self._load_s = [0.0] * self._n_ranks

    def assign(self, level: list[int], tokens: list[int], load_s: list[float]) -> list[int] | None:
        """Return the slots of sequences with non-rising levels, or None if one does not fit.

        Sequences on the whole group have a single slot. The others, the longest first, go to the
        slot of their width whose busiest rank has the least load.
        """
        group_level, n_group = len(self._widths) - 1, 0
        # In a group of one rank the only level is both local and the whole group: local.
        while group_level and n_group < len(level) and level[n_group] == group_level:
            n_group += 1
        self._tokens = [sum(tokens[:n_group])] * self._n_ranks
        self._load_s = [sum(load_s[:n_group])] * self._n_ranks
        if self._tokens[0] > self._capacity:
            return None
        slots = [self._group_slot] * n_group
        for k in range(n_group, len(level)):
            if not level[k]:
                break
            slot = self._place_sharded(level[k], tokens[k], load_s[k])
            if slot < 0:
                return None
            slots.append(slot)
        return self._place_local(slots, tokens, load_s)

    def _place_sharded(self, level: int, tokens: int, load_s: float) -> int:
        """Place a sequence on the least loaded CP group with capacity; return its slot or -1."""
        width, best_first, min_load_s = self._widths[level], -1, np.inf
        for first in range(0, self._n_ranks, width):
            ranks = slice(first, first + width)
            group_s = max(self._load_s[ranks])
            if group_s < min_load_s and max(self._tokens[ranks]) + tokens <= self._capacity:
                best_first, min_load_s = first, group_s
        if best_first < 0:
            return -1
        for rank in range(best_first, best_first + width):
            self._tokens[rank] += tokens
            self._load_s[rank] += load_s
        # Slots are sorted by width: those of lower levels come before.
        n_before = sum(self._n_ranks // narrower for narrower in self._widths[:level])
        return n_before + best_first // width

    def _place_local(
        self, slots: list[int], tokens: list[int], load_s: list[float]
    ) -> list[int] | None:
        """Append the slots of the remaining sequences: single ranks, by LPT with a memory limit."""
        heap = [(rank_s, rank) for rank, rank_s in enumerate(self._load_s)]
        heapify(heap)
        rank_tokens, capacity = self._tokens, self._capacity
        begin = len(slots)
        for own_tokens, own_s in zip(tokens[begin:], load_s[begin:], strict=True):
            rank_s, rank = heap[0]
            # Full ranks return to the heap afterwards: shorter sequences may still fit.
            skipped = []
            while rank_tokens[rank] + own_tokens > capacity:
                skipped.append(heappop(heap))
                if not heap:
                    return None
                rank_s, rank = heap[0]
            heapreplace(heap, (rank_s + own_s, rank))
            rank_tokens[rank] += own_tokens
            slots.append(rank)
            for entry in skipped:
                heappush(heap, entry)
        return slots
