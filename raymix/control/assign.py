"""Who decides which rank takes which document of a step: the seam, and planning on the spot.

A schedule is a pure function of the step's lengths, so every rank can work it out for itself and
comes to the same. An actor that plans ahead takes the same place.
"""

from __future__ import annotations

from collections.abc import Callable

from raymix.control.slab import Ints
from raymix.schedule import CostModel, Layout, Schedule, plan_batch

Assignments = Callable[[int, Ints], Schedule]
"""Returns the schedule of a step, given the step and its documents' tokens, shape (N,)."""


def planned_here(layout: Layout, cost: CostModel, planner: str = "refine") -> Assignments:
    """Return assignments that this process plans when it is asked.

    Raises:
        ScheduleError: When asked, if a document is too long for a group of ranks.
    """
    return lambda step, length_N: plan_batch(length_N, layout, cost, planner)


def whole_documents(ranks: int, most_tokens: int) -> Assignments:
    """Return assignments that keep every document on one of `ranks` and balance their work.

    Args:
        ranks: Ranks that share each step.
        most_tokens: Tokens that one of them holds at once.
    """
    # Only the ratio matters: attention overtakes the rest at some thousands of tokens.
    cost = CostModel(quadratic_s=1e-4, linear_s=1.0, memory_tokens=most_tokens)
    return planned_here(Layout(ranks), cost)
