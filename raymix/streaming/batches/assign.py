"""Who decides which rank takes which document of a step: the seam, and planning on the spot.

A schedule is a pure function of the step's lengths, so every rank can work it out for itself and
comes to the same. The actor of `raymix.streaming.sequences.actor`, which plans ahead, takes the
same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raymix.sampling import DocumentStep, MixtureLog
from raymix.schedule import CostModel, Layout, MicroBatch, training_planner


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentContext:
    """A rank, and what it knows of what it reads: all that assignments depend on."""

    rank: int
    log: MixtureLog
    """The mixture log as far as the rank knows it; grows."""
    until: Callable[[], int]
    """Returns the step before which that log is final."""
    origin: Callable[[int], Mapping[str, Any]]
    """Returns the state of a `DocumentPlanner` at a step or before it."""


RankAssignment = Callable[[DocumentStep], tuple[MicroBatch, ...]]
"""Returns what a rank holds of a step, as many micro-batches on every rank; asked step by step."""

Assignments = Callable[[AssignmentContext], RankAssignment]


def assign_locally(layout: Layout, cost: CostModel, planner: str = "refine") -> Assignments:
    """Return assignments that this process plans when it is asked.

    Raises:
        ScheduleError: If the planner is unknown; when asked, if a document is too long for a group
            of ranks.
    """
    chosen = training_planner(planner)

    def assignments(reader: AssignmentContext) -> RankAssignment:
        return lambda step: chosen.plan(step.length_N, layout, cost).micro_batches(reader.rank)

    return assignments


def assign_whole_documents(ranks: int, most_tokens: int) -> Assignments:
    """Return assignments that keep every document on one of `ranks` and balance their work.

    Args:
        ranks: Ranks that share each step.
        most_tokens: Tokens that one of them holds at once.
    """
    # Only the ratio matters: attention overtakes the rest at some thousands of tokens.
    cost = CostModel(quadratic_s=1e-4, linear_s=1.0, memory_tokens=most_tokens)
    return assign_locally(Layout(ranks), cost)
