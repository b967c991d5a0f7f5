"""Planners for training, where a step must not wait for its plan."""

from __future__ import annotations

from numpy.typing import ArrayLike

from raymix.schedule.base import PlacingPlanner, Planner, get_planner
from raymix.schedule.cost.model import CostModel
from raymix.schedule.layout import Layout
from raymix.schedule.plan import Schedule
from raymix.schedule.planners.refine import quickly_refined

_LONG_S = 1.0
"""Steps of so many seconds hide the whole search of `refine`, up to 0.3 s in small batches."""
_QUICK = PlacingPlanner("refine", quickly_refined)


class PacedRefine:
    """`refine` with its whole search where a step takes long by the cost model, else with less.

    What it does depends on lengths, layout and cost alone, so all ranks come to the same.
    """

    def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
        """Return the schedule of a batch; see `Planner`."""
        found = _QUICK.plan(lengths, layout, cost)
        return get_planner("refine").plan(lengths, layout, cost) if _pays(found) else found


def _pays(found: Schedule) -> bool:
    return found.seconds >= _LONG_S


def training_planner(name: str) -> Planner:
    """Return the planner of a name as training uses it.

    Raises:
        ScheduleError: If the name is unknown.
    """
    return PacedRefine() if name == "refine" else get_planner(name)
