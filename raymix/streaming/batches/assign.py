"""Assignment of a step's documents to ranks: the interface, and planning in this process.

A schedule is a pure function of the step's lengths, so each rank can compute it for itself and all
get the same. The actor of `raymix.streaming.sequences.actor`, which plans ahead, implements the
same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raymix.sampling import DocumentStep, MixtureLog
from raymix.schedule import CostModel, Layout, MicroBatch, training_planner


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentContext:
    """A rank and the state of its stream: all that assignments depend on."""

    rank: int
    log: MixtureLog
    """The mixture log as far as the rank has it; grows."""
    until: Callable[[], int]
    """Returns the step below which that log is final."""
    planner_state: Callable[[int], Mapping[str, Any]]
    """Returns the state of a `DocumentPlanner` at a step or before it."""


RankAssignment = Callable[[DocumentStep], tuple[MicroBatch, ...]]
"""Returns a rank's micro-batches of a step, the same number on all ranks; called step by step."""

Assignments = Callable[[AssignmentContext], RankAssignment]


def assign_locally(layout: Layout, cost: CostModel, planner: str = "refine") -> Assignments:
    """Return assignments that this process plans, step by step.

    Raises:
        ScheduleError: If the planner is unknown; in a step, if a document is too long for a group
            of ranks.
    """
    schedule_planner = training_planner(planner)

    def assignments(context: AssignmentContext) -> RankAssignment:
        return lambda step: schedule_planner.plan(step.length_N, layout, cost).micro_batches(
            context.rank
        )

    return assignments


def assign_whole_documents(ranks: int, max_tokens: int) -> Assignments:
    """Return assignments without shared documents, balanced over `ranks`.

    Args:
        ranks: Ranks that share each step.
        max_tokens: Tokens that fit a micro-batch of one rank.
    """
    # Only the ratio matters, no hardware is known here: at 10,000 tokens attention, quadratic in
    # the length, costs as much as the linear rest.
    cost = CostModel(quadratic_s=1e-4, linear_s=1.0, memory_tokens=max_tokens)
    return assign_locally(Layout(ranks), cost)
