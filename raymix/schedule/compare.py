"""All planners on the same batches: how long a step takes, by the cost model.

Legend: K sequences of a batch, S steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymix.errors import ScheduleError
from raymix.schedule.base import get_planner, known_planners
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import lower_bound
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.plan import Schedule, checked_lengths

BASELINES = ("default", "packed")
MOST_EXACT = 10
"""Sequences in a batch up to which `milp` is compared without being asked for."""


@dataclass(slots=True)
class PlannerTotals:
    """What one planner did, over all steps."""

    seconds: float = 0.0
    plan_s: float = 0.0
    violations: int = 0
    micro_steps: int = 0
    steps: int = 0
    most_tokens: int = 0
    gathered: int = 0
    """Tokens whose keys and values came to a rank from others, over ranks."""
    busy: float = 0.0
    """Mean over ranks of the time at work."""
    last: Schedule | None = None

    def add(self, schedule: Schedule, cost: CostModel, plan_s: float) -> None:
        """Count one step."""
        self.seconds += schedule.seconds
        self.plan_s += plan_s
        self.violations += schedule.violations(cost)
        self.micro_steps += schedule.micro_steps
        self.steps += 1
        self.most_tokens = max(self.most_tokens, int(schedule.memory_R.max(initial=0)))
        self.gathered += int(schedule.timing.gathered_MR.sum())
        self.busy += float(schedule.timing.busy_MR.sum(axis=0).mean())
        self.last = schedule


@dataclass(frozen=True, slots=True)
class Comparison:
    """Planners side by side."""

    layout: Layout
    cost: CostModel
    sequences: int
    """In a batch."""
    bound_s: float
    """Sum over steps of what no schedule can beat."""
    tallies: dict[str, PlannerTotals]
    left_out: dict[str, str] = field(default_factory=dict)
    """Planners that could not plan these batches, and why."""

    def document(self) -> dict[str, Any]:
        """Return the comparison in JSON types, the fastest planner first."""
        order = sorted(self.tallies, key=lambda name: (self.tallies[name].seconds, name))
        return {
            "steps": max(tally.steps for tally in self.tallies.values()),
            "sequences": self.sequences,
            "layout": {
                "groups": self.layout.groups,
                "context": self.layout.context,
                "widths": list(self.layout.widths),
                "barrier": self.layout.barrier,
            },
            "cost": self.cost.document(),
            "bound_s": self.bound_s,
            "planners": {name: self._row(self.tallies[name]) for name in order},
            "left_out": self.left_out,
        }

    def _row(self, tally: PlannerTotals) -> dict[str, Any]:
        steps = tally.steps
        over = {name: self.tallies[name].seconds / tally.seconds for name in BASELINES}
        return {
            **{f"speedup_over_{name}": ratio for name, ratio in over.items()},
            "share_of_bound": self.bound_s / tally.seconds,
            "memory_violations": tally.violations,
            "plan_ms": 1000 * tally.plan_s / steps,
            "step_s": tally.seconds / steps,
            "busy_share": tally.busy / tally.seconds,
            "micro_steps": tally.micro_steps / steps,
            "most_tokens": tally.most_tokens,
            "gathered_tokens": tally.gathered / steps / self.layout.ranks,
        }


def compare_planners(
    lengths: ArrayLike,
    layout: Layout,
    cost: CostModel,
    *,
    batch: int,
    steps: int,
    seed: int = 0,
    planners: Sequence[str] = (),
) -> Comparison:
    """Return what every planner makes of the same batches, drawn from the lengths.

    Args:
        lengths: Tokens of the sequences of a corpus.
        layout: The ranks.
        cost: Times and memory.
        batch: Sequences in a global batch.
        steps: Batches.
        seed: Of the draw. Sequences return only after all have been drawn.
        planners: Names; left out, all, `milp` in small batches only. The baselines are always
            there.

    Raises:
        ScheduleError: If there are no lengths, one is too long, or a planner is unknown.
    """
    length_K = checked_lengths(lengths, layout, cost)
    for name, value in (("lengths", length_K.size), ("batch", batch), ("steps", steps)):
        if value < 1:
            raise ScheduleError.at(name, value, "at least one is needed")
    left_out: dict[str, str] = {}
    wanted = list(planners or known_planners())
    if not planners and batch > MOST_EXACT:
        wanted.remove("milp")
        left_out["milp"] = f"exact plans of more than {MOST_EXACT} sequences can take hours"
    names = dict.fromkeys((*BASELINES, *wanted))
    chosen = {name: get_planner(name) for name in names}
    tallies = {name: PlannerTotals() for name in chosen}
    bound = 0.0
    for drawn_K in _batches(length_K, batch, steps, seed):
        bound += lower_bound(drawn_K, layout, cost)
        for name, planner in chosen.items():
            if name in left_out:
                continue
            begin = time.process_time()
            try:
                schedule = planner.plan(drawn_K, layout, cost)
            except ScheduleError as error:
                left_out[name] = str(error)
                del tallies[name]
                continue
            tallies[name].add(schedule, cost, time.process_time() - begin)
    return Comparison(layout, cost, batch, bound, tallies, left_out)


def _batches(length_K: Ints, batch: int, steps: int, seed: int) -> Iterator[Ints]:
    """Yield batches; every sequence once before any comes again."""
    rng = np.random.default_rng(seed)
    order = np.zeros(0, dtype=np.int64)
    for _ in range(steps):
        while order.size < batch:
            order = np.append(order, rng.permutation(length_K.size))
        yield length_K[order[:batch]]
        order = order[batch:]
