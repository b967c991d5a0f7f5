"""Partitions of groups into micro-batches, assigned to slots for all groups at once.

Legend: K sequences of the batch, longest first; M micro-batches of a group; B as in `assignment`,
where the rows are the micro-batches of all partitions one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from raymix.schedule.local_search.rules import estimate_seconds, width_rules

_SPLITS: tuple[SplitFunction, ...] = (split_balanced, split_strided, split_by_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBudget:
    """Limits of the search of `refine`: numbers of candidates and rounds."""

    extra_micro_batches: int
    """Micro-batches tried beyond the fewest."""
    assigned_partitions: int
    """Partitions of a group that are assigned to slots; the others are only estimated."""
    rules_per_kind: int
    """Width rules of each kind that are assigned in a micro-batch."""
    dense_rules: bool
    """Whether more of the rules for several widths are estimated."""
    exchange_rounds: int
    """Rounds of exchanges between groups."""
    min_round_gain: float
    """Fraction of the time that a round must gain for another one to follow."""
    exchange_rules_per_kind: int
    """`rules_per_kind` after an exchange."""
    anneal: bool
    """Whether the search also starts from the plan of `hdp`, and the plans are annealed."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A group's sequences in micro-batches, with their assignments to slots and times."""

    group: int
    parts: list[Ints]
    """Sequences of each micro-batch, by index in the batch, rising."""
    slots: list[Ints]
    """Their slots; empty before the first assignment."""
    second_M: Floats
    """Time of each micro-batch, an estimate before the first assignment."""

    @property
    def seconds(self) -> float:
        """Return the time of the group."""
        return float(self.second_M.sum())


_UNKNOWN_S = np.full(1, np.inf)
_NO_SLOTS = np.zeros((0, 0), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class PartitionSearch:
    """Builds partitions of a batch's groups and assigns them to slots."""

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
            while not (of_group := self._split(group, ids, n_parts)):
                n_parts += 1
            partitions += of_group
            max_parts = min(n_parts + self.budget.extra_micro_batches, ids.size)
            for more_parts in range(n_parts + 1, max_parts + 1):
                partitions += self._split(group, ids, more_parts)
        return fastest(self._estimate(partitions), self.budget.assigned_partitions)

    def _estimate(self, partitions: Sequence[Partition]) -> list[Partition]:
        """Return the partitions with estimated times."""
        tables = self._tables(partitions)
        if tables is None:
            return list(partitions)
        return _with_assignments(partitions, _NO_SLOTS, estimate_seconds(tables))

    def assign(
        self, partitions: Sequence[Partition], *, after_exchange: bool = False
    ) -> list[Partition]:
        """Return the partitions with the fastest assignments by width rules."""
        tables = self._tables(partitions)
        if tables is None:
            return list(partitions)
        budget = self.budget
        max_rules = budget.exchange_rules_per_kind if after_exchange else budget.rules_per_kind
        level_BXK = width_rules(tables, max_rules, dense=budget.dense_rules)
        return _with_assignments(partitions, *assign_by_rules(tables, level_BXK))

    def of_placement(self, group: int, ids: Ints, placement: Placement) -> Partition:
        """Return one group's partition in a placement."""
        slots, width_K = self.layout.slots, placement.width_K[ids]
        # Slots are sorted by width, and those of one width by first rank.
        begin_K = np.searchsorted(slots.width_T, width_K)
        slot_K = begin_K + placement.first_K[ids] % self.layout.context // width_K
        micro_K = placement.micro_K[ids]
        parts = [np.flatnonzero(micro_K == micro) for micro in np.unique(micro_K)]
        partition = Partition(
            group, [ids[part] for part in parts], [slot_K[part] for part in parts], _UNKNOWN_S
        )
        tables = self._tables([partition])
        if tables is None:
            return replace(partition, second_M=np.zeros(0))
        slot_BK = np.full(tables.length_BK.shape, -1)
        for row, slots_of_part in zip(slot_BK, partition.slots, strict=True):
            row[: slots_of_part.size] = slots_of_part
        second_BN = Loads.of(tables, slot_BK).seconds(self.cost)
        return replace(partition, second_M=second_BN.max(axis=1))

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


def _with_assignments(
    partitions: Sequence[Partition], slot_BK: Ints, second_B: Floats
) -> list[Partition]:
    """Return the partitions with assignments (may be none) and times of all parts in order."""
    updated: list[Partition] = []
    begin = 0
    for partition in partitions:
        rows = slice(begin, begin + len(partition.parts))
        begin = rows.stop
        # Not strict: estimates come without assignments. Rows are cut to the length of the part.
        pairs = zip(slot_BK[rows], partition.parts, strict=False)
        slots = [slot_K[: part.size] for slot_K, part in pairs]
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
