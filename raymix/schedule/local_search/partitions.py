"""Partitions of groups into micro-batches, assigned to slots and improved for all groups at once.

Legend: K sequences of the batch, longest first; M micro-batches of a group; B, C, S as in
`assignment`, where the rows are the micro-batches of all partitions one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import (
    SplitFunction,
    min_micro_batches,
    split_balanced,
    split_by_length,
    split_strided,
)
from raymix.schedule.layout import Floats, Ints, Layout
from raymix.schedule.local_search.assignment import CostTables, Loads, assign_by_rules
from raymix.schedule.local_search.moves import improve, insert_unassigned
from raymix.schedule.local_search.rules import estimate_seconds, width_rules

_SPLITS: tuple[SplitFunction, ...] = (split_balanced, split_strided, split_by_length)
# Below this fraction of the memory, more micro-batches than needed cannot pay: merging two whose
# assignments fit in one is never slower.
_MIN_FILL_TO_SPLIT = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBudget:
    """Limits of the search of `refine`: numbers of candidates and rounds, and tolerances."""

    extra_micro_batches: int
    """Micro-batches tried beyond the fewest, where memory is short."""
    assigned_partitions: int
    """Partitions of a group that are assigned to slots; the others are only estimated."""
    improved_partitions: int
    """Partitions of a group that are improved by moves."""
    rules_per_kind: int
    """Width rules of each kind that are assigned in a micro-batch."""
    dense_rules: bool
    """Whether more of the rules for several widths are estimated."""
    start_assignments: int
    """Assignments of a micro-batch that are improved by moves."""
    max_moves: int
    """Moves and swaps in a micro-batch."""
    move_candidates: int
    """Sequences of the slowest rank that are tried in a move."""
    swap_candidates: int
    """Sequences of other ranks that are tried as their partners in a swap."""
    balance_tolerance: float
    """Fraction of the time below which the mean wait of ranks is not worth a swap."""
    max_exchange_rounds: int
    """Rounds of exchanges between micro-batches."""
    patience: int
    """Rounds without a gain after which the exchanges still go on."""
    min_round_gain: float
    """Fraction of the time that counts as a gain of a round."""
    random_exchanges: int
    """Random exchanges per round and pair of groups, besides those chosen by work."""
    exchange_rules_per_kind: int
    """`rules_per_kind` after an exchange."""
    exchange_start_assignments: int
    """Assignments by rules after an exchange, besides the old one with the sequence inserted."""
    exchange_max_moves: int
    """`max_moves` after an exchange."""
    anneal: bool
    """Whether all starts are improved and the plans annealed; else only the fastest start is."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A group's sequences in micro-batches, with their assignments to slots and times."""

    group: int
    parts: list[Ints]
    """Sequences of each micro-batch, by index in the batch, rising."""
    slots: list[Ints]
    """Their assignments, the best first, (S, K) each; empty before the first assignment."""
    second_M: Floats
    """Time of each micro-batch with the first assignment, or an estimate before it."""

    @property
    def seconds(self) -> float:
        """Return the time of the group."""
        return float(self.second_M.sum())


_UNKNOWN_S = np.full(1, np.inf)


@dataclass(frozen=True, slots=True)
class PartitionSearch:
    """Builds, assigns and improves partitions of a batch's groups."""

    length_K: Ints
    layout: Layout
    cost: CostModel
    budget: SearchBudget

    def split(self, groups: Sequence[Ints]) -> list[Partition]:
        """Return the partitions of each group with the least estimated time.

        Args:
            groups: Sequences of each group, rising.
        """
        partitions: list[Partition] = []
        for group, ids in enumerate(groups):
            n_parts = min_micro_batches(self.length_K[ids], self.layout, self.cost)
            while not (of_fewest := self._split(group, ids, n_parts)):
                n_parts += 1
            partitions += of_fewest
            max_parts = n_parts
            if self._is_memory_short(ids, n_parts):
                max_parts = min(n_parts + self.budget.extra_micro_batches, ids.size)
            for more_parts in range(n_parts + 1, max_parts + 1):
                partitions += self._split(group, ids, more_parts)
        return fastest(self._estimate(partitions), self.budget.assigned_partitions)

    def _estimate(self, partitions: Sequence[Partition]) -> list[Partition]:
        """Return the partitions with estimated times."""
        tables = self._tables(partitions)
        if tables is None:
            return list(partitions)
        return _with_assignments(partitions, [], estimate_seconds(tables))

    def assign(self, partitions: Sequence[Partition]) -> list[Partition]:
        """Return the partitions with the best assignments by width rules."""
        tables = self._tables(partitions)
        if tables is None:
            return list(partitions)
        assignments, second_B = self._assign_by_rules(tables, self.budget.rules_per_kind)
        return _with_assignments(partitions, assignments, second_B)

    def improve(self, partitions: Sequence[Partition]) -> list[Partition]:
        """Return the best partition of each group after moves in the best few of each."""
        selected = fastest(partitions, self.budget.improved_partitions)
        return fastest(self._improve(selected, self.budget.max_moves), 1)

    def improve_exchanged(self, partitions: Sequence[Partition]) -> list[Partition]:
        """Return partitions improved after exchanges; a sequence just added has slot -1."""
        tables = self._tables(partitions)
        if tables is None:
            return list(partitions)
        old_slots = [slot_SK for partition in partitions for slot_SK in partition.slots]
        slot_BK = insert_unassigned(tables, _stack(tables, old_slots))
        fits_B = ((slot_BK >= 0) | (tables.length_BK == 0)).all(axis=1)
        assignments = [
            slot_K[None] if fits else slot_K[None][:0]
            for slot_K, fits in zip(slot_BK, fits_B.tolist(), strict=True)
        ]
        # A new sequence without a free slot needs an assignment by rules in any case: one exists,
        # as an exchange keeps the sharded tokens within memory.
        n_starts = self.budget.exchange_start_assignments
        rows = np.flatnonzero(~fits_B | (n_starts > 0))
        if rows.size:
            by_rules, _ = self._assign_by_rules(
                tables.rows(rows), self.budget.exchange_rules_per_kind
            )
            for row, slot_SK in zip(rows.tolist(), by_rules, strict=True):
                assignments[row] = np.vstack([assignments[row], slot_SK[: max(1, n_starts)]])
        unimproved = _with_assignments(partitions, assignments, np.zeros(len(assignments)))
        return self._improve(unimproved, self.budget.exchange_max_moves)

    def _assign_by_rules(self, tables: CostTables, max_rules: int) -> tuple[list[Ints], Floats]:
        """Return assignments by rules, (S, K) per micro-batch, and the times of the first, (B,)."""
        level_BXK = width_rules(tables, max_rules, dense=self.budget.dense_rules)
        slot_BSK, second_BS = assign_by_rules(tables, level_BXK, self.budget.start_assignments)
        fits_BS = second_BS < np.inf
        fitting = [slot_SK[fits] for slot_SK, fits in zip(slot_BSK, fits_BS, strict=True)]
        return fitting, second_BS[:, 0]

    def _improve(self, partitions: Sequence[Partition], max_moves: int) -> list[Partition]:
        """Return the partitions with the best of their assignments after moves."""
        tables = self._tables(partitions)
        if tables is None:
            return list(partitions)
        assignments = [slot_SK for partition in partitions for slot_SK in partition.slots]
        count_B = np.array([slot_SK.shape[0] for slot_SK in assignments])
        # One row per assignment: all assignments of all micro-batches are improved in one call.
        repeated = tables.rows(np.repeat(np.arange(count_B.size), count_B))
        slot_CK = improve(repeated, _stack(repeated, assignments), max_moves, self.budget)
        second_C = Loads.of(repeated, slot_CK).seconds(self.cost).max(axis=1)
        begin_B = np.cumsum(count_B) - count_B
        ranges = zip(begin_B.tolist(), (begin_B + count_B).tolist(), strict=True)
        best_B = [begin + int(second_C[begin:end].argmin()) for begin, end in ranges]
        best_slots = [slot_CK[row : row + 1] for row in best_B]
        return _with_assignments(partitions, best_slots, second_C[best_B])

    def of_placement(self, group: int, ids: Ints, placement: Placement) -> Partition:
        """Return one group's partition in a placement; its times are not computed (0)."""
        slots, width_K = self.layout.slots, placement.width_K[ids]
        # Slots are sorted by width, and those of one width by first rank.
        begin_K = np.searchsorted(slots.width_T, width_K)
        slot_K = begin_K + placement.first_K[ids] % self.layout.context // width_K
        micro_K = placement.micro_K[ids]
        parts = [np.flatnonzero(micro_K == micro) for micro in np.unique(micro_K)]
        return Partition(
            group,
            [ids[part] for part in parts],
            [slot_K[None, part] for part in parts],
            np.zeros(len(parts)),
        )

    def _tables(self, partitions: Sequence[Partition]) -> CostTables | None:
        """Return the cost tables of all micro-batches, or None if there are none."""
        parts = [self.length_K[part] for partition in partitions for part in partition.parts]
        return CostTables.of(parts, self.layout, self.cost) if parts else None

    def _split(self, group: int, ids: Ints, n_parts: int) -> list[Partition]:
        """Return partitions into at most `n_parts` micro-batches, one per successful split."""
        if not ids.size:
            return [Partition(group, [], [], np.zeros(0))]
        # Into one part all splits are the same.
        functions = _SPLITS if n_parts > 1 else _SPLITS[:1]
        splits = [split(self.length_K[ids], n_parts, self.layout, self.cost) for split in functions]
        return [
            Partition(group, [ids[part] for part in parts if part.size], [], _UNKNOWN_S)
            for parts in splits
            if parts is not None
        ]

    def _is_memory_short(self, ids: Ints, n_parts: int) -> bool:
        """Return whether more than `n_parts` micro-batches may be faster."""
        capacity = n_parts * self.cost.memory_tokens * self.layout.context
        return int(self.length_K[ids].sum()) > _MIN_FILL_TO_SPLIT * capacity


def _stack(tables: CostTables, assignments: Sequence[Ints]) -> Ints:
    """Return all assignments (S, K) one below the other, -1 for padding, shape (C, K)."""
    n_rows = sum(slot_SK.shape[0] for slot_SK in assignments)
    slot_CK = np.full((n_rows, tables.length_BK.shape[1]), -1)
    begin = 0
    for slot_SK in assignments:
        end = begin + slot_SK.shape[0]
        slot_CK[begin:end, : slot_SK.shape[1]] = slot_SK
        begin = end
    return slot_CK


def _with_assignments(
    partitions: Sequence[Partition], assignments: Sequence[Ints], second_B: Floats
) -> list[Partition]:
    """Return the partitions with assignments (may be none) and times of all parts in order."""
    updated: list[Partition] = []
    begin = 0
    for partition in partitions:
        rows = slice(begin, begin + len(partition.parts))
        begin = rows.stop
        # Not strict: estimates come without assignments. Rows are cut to the length of the part.
        pairs = zip(assignments[rows], partition.parts, strict=False)
        slots = [slot_SK[:, : part.size] for slot_SK, part in pairs]
        updated.append(Partition(partition.group, partition.parts, slots, second_B[rows]))
    return updated


def fastest(partitions: Sequence[Partition], max_per_group: int) -> list[Partition]:
    """Return the fastest partitions, at most `max_per_group` of each group, group by group."""
    # The index breaks ties, so that equal batches have equal plans.
    order = sorted(
        range(len(partitions)),
        key=lambda index: (partitions[index].group, partitions[index].seconds, index),
    )
    by_group: dict[int, list[Partition]] = {}
    for index in order:
        selected = by_group.setdefault(partitions[index].group, [])
        if len(selected) < max_per_group:
            selected.append(partitions[index])
    return [partition for selected in by_group.values() for partition in selected]
