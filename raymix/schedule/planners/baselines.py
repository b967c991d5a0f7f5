"""Baseline planners: one sequence at a time, sorted by length, and packed.

* `default`: one sequence per micro-step and group, sharded over the group, in order of arrival, as
  frameworks do without packing. The result must not depend on the order of ids, so the order of
  arrival is a fixed random one.
* `sorted`: the same by length, so that sequences of similar length run at once: LongAlign's sorted
  batching (arXiv 2401.18058) within a global batch, whose content does not change.
* `packed`: work balanced over groups and over the fewest micro-batches, everything sharded; the
  strong baseline.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import (
    PlacementBuilder,
    lpt_bins,
    smallest_split,
    split_balanced,
    split_strided,
)
from raymix.schedule.layout import Ints, Layout


@planner("default")
def default(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return one sequence per micro-step and group, sharded, in the order of arrival."""
    return _one_per_group(np.random.default_rng(0).permutation(length_K.size), layout)


@planner("sorted")
def by_length(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return one sequence per micro-step and group, sharded, similar lengths in one micro-step."""
    groups = layout.groups
    turn_K = np.arange(length_K.size)
    # Back and forth over the groups, or the first group gets the longest of every micro-step.
    backward = (turn_K // groups) % 2 == 1
    group_K = np.where(backward, groups - 1 - turn_K % groups, turn_K % groups)
    return _one_per_group(turn_K // groups * groups + group_K, layout)


def _one_per_group(turn_K: Ints, layout: Layout) -> Placement:
    """Return the placement of sequences by turn, group by group in each micro-step."""
    width = np.full(turn_K.size, layout.context, dtype=np.int64)
    return Placement(turn_K // layout.groups, turn_K % layout.groups * layout.context, width)


@planner("packed")
def packed(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return few micro-batches of balanced work, everything sharded over its group."""
    builder = PlacementBuilder(length_K.size, layout)
    # The last slot of a layout is the whole group.
    group_slot = layout.slots.width_T.size - 1
    work_K = cost.work(length_K, layout.context)
    for group, ids in enumerate(lpt_bins(work_K, layout.groups)):
        # `balanced` first: of two splits into equally many parts it has the more even work.
        parts = smallest_split(length_K[ids], layout, cost, (split_balanced, split_strided))
        for micro, part in enumerate(parts):
            builder.place(ids[part], group, micro, np.full(part.size, group_slot))
    return builder.build()
