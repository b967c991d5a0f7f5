"""`refine`, the default planner: cut-offs of length, then best-improving moves.

1. Work is balanced over the groups (LPT).
2. Each group is cut into the fewest micro-batches that hold it, in several ways; into more where
   that can still be faster (`cuts`).
3. In each micro-batch sequences above a cut-off of length are sharded and the others local; of all
   cut-offs, and of the rules for several widths, those that the cost model likes best (`rules`),
   seated by LPT (`seating`).
4. The best cuts of each group are improved by moves and swaps (`moves`), and the best is kept.
5. While it helps, the slowest groups give sequences to the fastest, or swap some with them.
6. Up to 24 sequences are annealed too (`anneal`): there a few must change places together.

The plans of `hdp` and `packed` cost little to make: steps 4 and 5 go on from the former where it is
the faster, in small batches from both, and whichever of all is fastest under the layout's barrier
is returned. So by the cost model it is given `refine` is never slower than these two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement, lower_bound, timing
from raymix.schedule.group import Draft, over_groups
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.local_search.anneal import SlotCosts, anneal
from raymix.schedule.local_search.cross_group_moves import exchange, rearrange
from raymix.schedule.local_search.cuts import Cut, Cutter, SearchBudget, fastest
from raymix.schedule.planners.baselines import packed
from raymix.schedule.planners.hdp import hdp

# Where balancing ends: part of the time.
_LEVEL = 0.002
# In small batches more is tried, for there it costs little.
_SMALL = 24
_MUCH = SearchBudget(
    annealed=True,
    more=3,
    seated=3,
    rules=8,
    dense=True,
    starts=4,
    kept=2,
    moves=24,
    moves_after=8,
    rules_after=4,
    starts_after=2,
    tried=12,
    swapped=24,
    even=0.003,
    rounds=3,
    drawn=6,
    patience=0,
    worth=0.0,
)
_LITTLE = SearchBudget(
    annealed=False,
    more=1,
    seated=2,
    rules=3,
    dense=False,
    starts=1,
    kept=1,
    moves=6,
    moves_after=2,
    rules_after=2,
    starts_after=1,
    tried=8,
    swapped=16,
    even=0.02,
    rounds=3,
    drawn=0,
    patience=0,
    worth=0.01,
)


@planner("refine")
def refine(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the placement found by cut-offs of length and improving moves."""
    return _refined(length_K, layout, cost, _MUCH if length_K.size <= _SMALL else _LITTLE)


def quickly_refined(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return `refine`'s placement with as little search in small batches as in large ones."""
    return _refined(length_K, layout, cost, _LITTLE)


def _refined(length_K: Ints, layout: Layout, cost: CostModel, effort: SearchBudget) -> Placement:
    bound = lower_bound(length_K, layout, cost) * (1 + _LEVEL)
    simple, merged = packed(length_K, layout, cost), hdp(length_K, layout, cost)
    plans = [_timed(length_K, plan, layout, cost) for plan in (simple, merged)]
    if min(plans, key=_seconds)[0] <= bound:
        return min(plans, key=_seconds)[1]
    cutter = Cutter(length_K, layout, cost, effort)
    starts = [cutter.seated(cutter.split(over_groups(length_K, layout, cost)))]
    if effort.annealed:
        starts.append(_taken(cutter, merged))
    elif plans[1][0] <= _slowest(fastest(starts[0], 1)):
        starts = [_taken(cutter, merged)]
    for start in starts:
        placed = _traded(cutter, cutter.improved(start))
        plans.append(_timed(length_K, placed, layout, cost))
    if effort.annealed and min(plans, key=_seconds)[0] > bound:
        found = [plan for _, plan in plans]
        micro = 1 + max(int(plan.micro_K.max()) for plan in found)
        placed = anneal(SlotCosts(length_K, layout, cost, micro), found)
        plans.append(_timed(length_K, placed, layout, cost))
    return min(plans, key=_seconds)[1]


def _timed(
    length_K: Ints, placed: Placement, layout: Layout, cost: CostModel
) -> tuple[float, Placement]:
    return timing(length_K, placed, layout, cost).seconds, placed


def _seconds(plan: tuple[float, Placement]) -> float:
    return plan[0]


def _slowest(cuts: Sequence[Cut]) -> float:
    return max(cut.seconds for cut in cuts)


def _taken(cutter: Cutter, placed: Placement) -> list[Cut]:
    """Return the cuts of another plan."""
    group_K = placed.first_K // cutter.layout.context
    groups = [np.flatnonzero(group_K == group) for group in range(cutter.layout.groups)]
    return [cutter.of_placement(at, ids, placed) for at, ids in enumerate(groups)]


def _traded(cutter: Cutter, cuts: list[Cut]) -> Placement:
    """Return the placement after trades between micro-batches."""
    effort, idle = cutter.effort, 0
    for turn in range(effort.rounds):
        before = _slowest(cuts)
        if effort.drawn:
            rearrange(cutter, cuts, turn)
        exchange(cutter, cuts, turn)
        # A round without a gain need not be the last: what is drawn differs from round to round.
        idle = 0 if _slowest(cuts) < before * (1 - effort.worth) else idle + 1
        if idle > effort.patience:
            break
    draft = Draft(cutter.length_K.size, cutter.layout)
    for group, cut in enumerate(cuts):
        # Where everyone waits for everyone, slow micro-batches belong together.
        for micro, at in enumerate(np.argsort(-cut.second_M, kind="stable").tolist()):
            draft.seat(cut.parts[at], group, micro, cut.slots[at][0])
    return draft.done()
