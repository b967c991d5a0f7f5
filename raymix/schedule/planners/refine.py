"""`refine`, the default planner: width rules, then local search on the cost model.

1. Work is balanced over the groups (LPT).
2. Each group is partitioned into the fewest micro-batches that hold it, by several splits; in
   small batches into more as well (`partitions`).
3. In each micro-batch, sequences above a length threshold are sharded and the others local; the
   thresholds, and the rules for several widths, with the least estimated time (`rules`) are
   assigned to slots by LPT (`assignment`).
4. While it helps, the slowest groups give sequences to the fastest, or exchange some with them
   (`exchanges`).
5. Batches of up to 24 sequences are annealed too (`anneal`), for improvements in which several
   sequences must change slots together.

The plans of `hdp` and `packed` are cheap. Step 4 starts from that of `hdp` where it is the faster,
in small batches from both, and the fastest of all plans under the layout's barrier is returned: by
its cost model, `refine` is never slower than these two.

Moves and swaps within a micro-batch and random exchanges were tried and removed: each gained less
than 0.5 % in the mean, and in large batches more rules and rounds gain more in the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from raymix.schedule.base import FunctionPlanner, Planner, get_planner, planner
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement, compute_timing, lower_bound
from raymix.schedule.group import PlacementBuilder, balance_groups
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.local_search.anneal import SlotEncoding, anneal
from raymix.schedule.local_search.exchanges import exchange_between_groups
from raymix.schedule.local_search.partitions import (
    Partition,
    PartitionSearch,
    SearchBudget,
    fastest,
)
from raymix.schedule.plan import Schedule
from raymix.schedule.planners.baselines import packed
from raymix.schedule.planners.hdp import hdp

# The search ends within this fraction of the lower bound: less than the cost model's error.
_BOUND_TOLERANCE = 0.002
# Up to so many sequences the full search takes 0.3 s at most.
_SMALL_BATCH = 24
# Steps of so many seconds by the cost model hide the full search, which takes 0.3 s.
_FULL_SEARCH_STEP_S = 1.0

FULL_BUDGET = SearchBudget(
    extra_micro_batches=3,
    assigned_partitions=3,
    rules_per_kind=8,
    dense_rules=True,
    exchange_rounds=6,
    min_round_gain=0.0,
    exchange_rules_per_kind=4,
    anneal=True,
)
FAST_BUDGET = SearchBudget(
    extra_micro_batches=0,
    assigned_partitions=2,
    rules_per_kind=6,
    dense_rules=False,
    exchange_rounds=6,
    min_round_gain=0.01,
    exchange_rules_per_kind=4,
    anneal=False,
)


@planner("refine")
def refine(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the placement found by width rules and local search."""
    budget = FULL_BUDGET if length_K.size <= _SMALL_BATCH else FAST_BUDGET
    return search_placement(length_K, layout, cost, budget)


def refine_fast(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the placement of `refine` with the budget of large batches for small ones too."""
    return search_placement(length_K, layout, cost, FAST_BUDGET)


_FAST_REFINE = FunctionPlanner("refine", refine_fast)


class TrainingRefine:
    """`refine` for training: the full search only where the step takes longer than planning it.

    Depends on lengths, layout and cost alone and not on a clock, so all ranks get one plan.
    """

    def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
        """Return the schedule of a batch; see `Planner`."""
        fast = _FAST_REFINE.plan(lengths, layout, cost)
        if fast.seconds < _FULL_SEARCH_STEP_S:
            return fast
        return get_planner("refine").plan(lengths, layout, cost)


def training_planner(name: str) -> Planner:
    """Return the planner of a name as training uses it.

    Raises:
        ScheduleError: If the name is unknown.
    """
    return TrainingRefine() if name == "refine" else get_planner(name)


TimedPlacement = tuple[float, Placement]
"""Seconds by the cost model, and the placement."""


def search_placement(
    length_K: Ints, layout: Layout, cost: CostModel, budget: SearchBudget
) -> Placement:
    """Return the fastest of `packed`, `hdp` and the placements found from them within a budget."""
    bound_s = lower_bound(length_K, layout, cost) * (1 + _BOUND_TOLERANCE)
    packed_plan, hdp_plan = packed(length_K, layout, cost), hdp(length_K, layout, cost)
    timed = [_timed(length_K, plan, layout, cost) for plan in (packed_plan, hdp_plan)]
    if min(timed, key=_seconds)[0] <= bound_s:
        return min(timed, key=_seconds)[1]
    search = PartitionSearch(length_K, layout, cost, budget)
    by_rules = search.assign(search.split(balance_groups(length_K, layout, cost)))
    starts = [fastest(by_rules, 1)]
    if budget.anneal:
        starts.append(_partitions_of(search, hdp_plan))
    elif timed[1][0] <= _max_seconds(starts[0]):
        starts = [_partitions_of(search, hdp_plan)]
    for start in starts:
        placement = _exchanged(search, start)
        timed.append(_timed(length_K, placement, layout, cost))
    if budget.anneal and min(timed, key=_seconds)[0] > bound_s:
        placements = [plan for _, plan in timed]
        n_micro = 1 + max(int(plan.micro_K.max()) for plan in placements)
        placement = anneal(SlotEncoding(length_K, layout, cost, n_micro), placements)
        timed.append(_timed(length_K, placement, layout, cost))
    # min returns the first of equal ones: a tie goes to the simpler plan.
    return min(timed, key=_seconds)[1]


def _timed(length_K: Ints, placement: Placement, layout: Layout, cost: CostModel) -> TimedPlacement:
    # The search knows the barrier "group" alone; here plans compete under the layout's own.
    return compute_timing(length_K, placement, layout, cost).seconds, placement


def _seconds(timed: TimedPlacement) -> float:
    # As the key of min: tuples of equal seconds would compare placements, which have no order.
    return timed[0]


def _max_seconds(partitions: Sequence[Partition]) -> float:
    return max(partition.seconds for partition in partitions)


def _partitions_of(search: PartitionSearch, placement: Placement) -> list[Partition]:
    """Return the partition of each group in another planner's placement."""
    group_K = placement.first_K // search.layout.context
    groups = [np.flatnonzero(group_K == group) for group in range(search.layout.groups)]
    return [search.of_placement(group, ids, placement) for group, ids in enumerate(groups)]


def _exchanged(search: PartitionSearch, partitions: list[Partition]) -> Placement:
    """Return the placement after exchanges between groups."""
    for _ in range(search.budget.exchange_rounds):
        before_s = _max_seconds(partitions)
        exchange_between_groups(search, partitions)
        if _max_seconds(partitions) >= before_s * (1 - search.budget.min_round_gain):
            break
    builder = PlacementBuilder(search.length_K.size, search.layout)
    for group, partition in enumerate(partitions):
        # Slowest first in every group: under the barrier "all" they then run at the same time.
        order = np.argsort(-partition.second_M, kind="stable")
        for micro, index in enumerate(order.tolist()):
            builder.place(partition.parts[index], group, micro, partition.slots[index])
    return builder.build()
