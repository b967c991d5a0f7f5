"""The planner interface: `Planner`, the registry of names, and `plan_batch`.

Legend: K sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.plan import Schedule, validate_lengths


@runtime_checkable
class Planner(Protocol):
    """Assigns the sequences of a global batch to ranks and micro-steps."""

    def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
        """Return the schedule of a batch; `lengths` in tokens, shape (K,).

        Raises:
            ScheduleError: If the lengths are invalid, or one is too long for a group.
        """
        ...


PlacementFunction = Callable[[Ints, Layout, CostModel], Placement]
"""Places sequences sorted by length, longest first; must not depend on the order of equal ones."""


class FunctionPlanner:
    """A planner around a function of the sorted lengths.

    Sorting makes every planner deterministic and independent of the order of ids: two orders of a
    batch get the same times, up to the rounding of sums in that order; only sequences of equal
    length may be exchanged.
    """

    def __init__(self, name: str, function: PlacementFunction) -> None:
        """Name the function."""
        self.name = name
        self._function = function

    def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
        """Return the schedule of a batch; see `Planner`."""
        length_K = validate_lengths(lengths, layout, cost)
        # Stable: the same ids get the same places on every platform, for ties too.
        order = np.argsort(-length_K, kind="stable")
        # Planners take maxima and means over sequences, which numpy refuses for none.
        placement = (
            self._function(length_K[order], layout, cost) if order.size else _EMPTY_PLACEMENT
        )
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        restored = Placement(
            placement.micro_K[inverse], placement.first_K[inverse], placement.width_K[inverse]
        )
        return Schedule.build(self.name, length_K, restored, layout, cost)


_NO_INTS = np.zeros(0, dtype=np.int64)
_EMPTY_PLACEMENT = Placement(_NO_INTS, _NO_INTS, _NO_INTS)
_PLANNERS: dict[str, Planner] = {}


def planner(name: str) -> Callable[[PlacementFunction], PlacementFunction]:
    """Return a decorator that registers a placement function as the planner `name`."""

    def register(function: PlacementFunction) -> PlacementFunction:
        # The function itself stays usable: `refine` calls `packed` and `hdp` on sorted lengths.
        _PLANNERS[name] = FunctionPlanner(name, function)
        return function

    return register


def known_planners() -> tuple[str, ...]:
    """Return the names of all planners, the default one first."""
    return tuple(sorted(_PLANNERS, key=lambda name: (name != "refine", name)))


def get_planner(name: str) -> Planner:
    """Return a planner by name.

    Raises:
        ScheduleError: If no planner has that name.
    """
    if name not in _PLANNERS:
        known = known_planners()
        suggestion = did_you_mean(name, known)
        raise ScheduleError.at(
            "planner", name, "not a planner", allowed=f"Known: {', '.join(known)}", fix=suggestion
        )
    return _PLANNERS[name]


def plan_batch(
    lengths: ArrayLike, layout: Layout, cost: CostModel, planner: str | Planner = "refine"
) -> Schedule:
    """Return the schedule of a global batch: the sequences of each rank in each micro-step.

    A pure function of its arguments: equal ones give equal schedules, on any machine.

    Args:
        lengths: Tokens of each sequence, shape (K,), each >= 1.
        layout: The ranks.
        cost: Times and memory of the model on the hardware; see `fit_cost_model`.
        planner: One of `known_planners()`, or an object with the method of `Planner`.

    Raises:
        ScheduleError: If the planner is unknown, the lengths are invalid, or one is too long for
            a whole group of ranks; the message has the numbers.
    """
    selected = get_planner(planner) if isinstance(planner, str) else planner
    return selected.plan(lengths, layout, cost)
