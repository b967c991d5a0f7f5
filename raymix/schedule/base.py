"""The seam of planners: `Planner`, the registry of names, and `plan_batch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.plan import Schedule, checked_lengths


@runtime_checkable
class Planner(Protocol):
    """Decides where the sequences of a global batch go."""

    def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
        """Return the schedule of a batch; `lengths` in tokens, shape (K,).

        Raises:
            ScheduleError: If the lengths are no lengths, or one is too long for a group.
        """
        ...


Place = Callable[[Ints, Layout, CostModel], Placement]
"""Places sequences, longest first; their order among equals is all that it may not depend on."""


class PlacingPlanner:
    """A planner around a function of the sorted lengths.

    Sorting first makes every planner deterministic and blind to the order of ids: two orders of
    a batch get the same times, and sequences of one length may change places.
    """

    def __init__(self, name: str, place: Place) -> None:
        """Give the function a name."""
        self.name = name
        self._place = place

    def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
        """Return the schedule of a batch; see `Planner`."""
        length_K = checked_lengths(lengths, layout, cost)
        order = np.argsort(-length_K, kind="stable")
        found = self._place(length_K[order], layout, cost) if order.size else _NOWHERE
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        placed = Placement(found.micro_K[back], found.first_K[back], found.width_K[back])
        return Schedule.build(self.name, length_K, placed, layout, cost)


_NONE = np.zeros(0, dtype=np.int64)
_NOWHERE = Placement(_NONE, _NONE, _NONE)
_PLANNERS: dict[str, Planner] = {}


def planner(name: str) -> Callable[[Place], Place]:
    """Return a decorator that registers a placing function as the planner `name`."""

    def register(place: Place) -> Place:
        _PLANNERS[name] = PlacingPlanner(name, place)
        return place

    return register


def known_planners() -> tuple[str, ...]:
    """Return the names of all planners, the default one first."""
    return tuple(sorted(_PLANNERS, key=lambda name: (name != "refine", name)))


def get_planner(name: str) -> Planner:
    """Return a planner by name.

    Raises:
        ScheduleError: If there is none of that name.
    """
    if name not in _PLANNERS:
        known = known_planners()
        near = did_you_mean(name, known)
        raise ScheduleError.at(
            "planner", name, "not a planner", allowed=f"Known: {', '.join(known)}", fix=near
        )
    return _PLANNERS[name]


def plan_batch(
    lengths: ArrayLike, layout: Layout, cost: CostModel, planner: str | Planner = "refine"
) -> Schedule:
    """Return which rank takes which sequences of a global batch, micro-step by micro-step.

    A pure function of its arguments: equal ones give equal schedules, on any machine.

    Args:
        lengths: Tokens of each sequence, shape (K,), each >= 1.
        layout: The ranks.
        cost: Times and memory of the model on the hardware; see `fit_cost_model`.
        planner: One of `known_planners()`, or a planner of your own.

    Raises:
        ScheduleError: If the planner is unknown, the lengths are no lengths, or one is too long
            for a whole group of ranks: the message has the numbers.
    """
    chosen = get_planner(planner) if isinstance(planner, str) else planner
    return chosen.plan(lengths, layout, cost)
