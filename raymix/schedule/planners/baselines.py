"""The planners to beat: one sequence at a time, sorted, and packed.

* `default`: one sequence per micro-step and group, sharded over the group, in the order of
  arrival: what frameworks do unpacked. Batches come in no order, so here it is a fixed random
  one: the result must not depend on how the ids were given.
* `sorted`: the same by length, so that what runs at once is alike: LongAlign's sorted batching
  (arXiv 2401.18058) within a global batch, whose content stays as it is.
* `packed`: work balanced over groups and over the fewest micro-batches, everything sharded; the
  strong baseline.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import Draft, balanced, first_split, least_loaded, strided
from raymix.schedule.layout import Ints, Layout


@planner("default")
def default(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return one sequence per micro-step and group, sharded, in the order of arrival."""
    return _one_each(np.random.default_rng(0).permutation(length_K.size), layout)


@planner("sorted")
def by_length(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return one sequence per micro-step and group, sharded, those of like length at once."""
    groups = layout.groups
    turn = np.arange(length_K.size)
    # Back and forth over the groups: else the first would get the longest of every micro-step.
    back = (turn // groups) % 2 == 1
    seat = np.where(back, groups - 1 - turn % groups, turn % groups)
    return _one_each(turn // groups * groups + seat, layout)


def _one_each(place_K: Ints, layout: Layout) -> Placement:
    width = np.full(place_K.size, layout.context, dtype=np.int64)
    return Placement(place_K // layout.groups, place_K % layout.groups * layout.context, width)


@planner("packed")
def packed(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return few micro-batches of balanced work, everything sharded over its group."""
    draft = Draft(length_K.size, layout)
    whole = layout.slots.width_T.size - 1
    work_K = cost.work(length_K, layout.context)
    for group, ids in enumerate(least_loaded(work_K, layout.groups)):
        parts = first_split(length_K[ids], layout, cost, (balanced, strided))
        for micro, part in enumerate(parts):
            draft.seat(ids[part], group, micro, np.full(part.size, whole))
    return draft.done()
