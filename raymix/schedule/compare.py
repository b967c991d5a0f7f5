"""Comparison of planners on the same batches: step times by the cost model.

Legend: K sequences of a batch.
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
from raymix.schedule.plan import Schedule, validate_lengths

BASELINES = ("default", "packed")
MAX_EXACT_SEQUENCES = 10
"""Sequences of a batch up to which `milp` is compared by default."""


@dataclass(slots=True)
class PlannerTotals:
    """Sums over the steps of one planner."""

    seconds: float = 0.0
    """Step times by the cost model."""
    plan_s: float = 0.0
    """CPU seconds of planning."""
    violations: int = 0
    micro_steps: int = 0
    steps: int = 0
    max_tokens: int = 0
    """Largest number of tokens on a rank in a micro-step."""
    gathered_tokens: int = 0
    """Tokens whose keys and values a rank gathered from others, summed over ranks."""
    busy_s: float = 0.0
    """Seconds at work, mean over ranks."""
    last_schedule: Schedule | None = None

    def add(self, schedule: Schedule, cost: CostModel, plan_s: float) -> None:
        """Add one step."""
        self.seconds += schedule.seconds
        self.plan_s += plan_s
        self.violations += schedule.violations(cost)
        self.micro_steps += schedule.micro_steps
        self.steps += 1
        self.max_tokens = max(self.max_tokens, int(schedule.memory_R.max(initial=0)))
        self.gathered_tokens += int(schedule.timing.gathered_MR.sum())
        self.busy_s += float(schedule.timing.busy_MR.sum(axis=0).mean())
        # One schedule is enough for the figures of a report; all of them would fill memory.
        self.last_schedule = schedule


@dataclass(frozen=True, slots=True)
class Comparison:
    """Totals of several planners on the same batches."""

    layout: Layout
    cost: CostModel
    sequences: int
    """Sequences of a batch."""
    bound_s: float
    """Lower bound of the step time, summed over steps."""
    totals: dict[str, PlannerTotals]
    left_out: dict[str, str] = field(default_factory=dict)
    """Planners that could not plan these batches, with the reason."""

    def document(self) -> dict[str, Any]:
        """Return the comparison in JSON types, the fastest planner first."""
        order = sorted(self.totals, key=lambda name: (self.totals[name].seconds, name))
        return {
            "steps": max(total.steps for total in self.totals.values()),
            "sequences": self.sequences,
            "layout": {
                "groups": self.layout.groups,
                "context": self.layout.context,
                "widths": list(self.layout.widths),
                "barrier": self.layout.barrier,
            },
            "cost": self.cost.document(),
            "bound_s": self.bound_s,
            "planners": {name: self._row(self.totals[name]) for name in order},
            "left_out": self.left_out,
        }

    def _row(self, total: PlannerTotals) -> dict[str, Any]:
        """Return one planner's ratios and means per step."""
        steps = total.steps
        speedups = {name: self.totals[name].seconds / total.seconds for name in BASELINES}
        return {
            **{f"speedup_over_{name}": ratio for name, ratio in speedups.items()},
            "share_of_bound": self.bound_s / total.seconds,
            "memory_violations": total.violations,
            "plan_ms": 1000 * total.plan_s / steps,
            "step_s": total.seconds / steps,
            "busy_share": total.busy_s / total.seconds,
            "micro_steps": total.micro_steps / steps,
            "most_tokens": total.max_tokens,
            "gathered_tokens": total.gathered_tokens / steps / self.layout.ranks,
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
    """Return the totals of several planners on the same batches, sampled from the lengths.

    Args:
        lengths: Tokens of the sequences of a corpus.
        layout: The ranks.
        cost: Times and memory.
        batch: Sequences of a global batch.
        steps: Batches.
        seed: Seed of the sampling, without replacement until all sequences have been drawn.
        planners: Names; by default all, `milp` in small batches only. The baselines are always
            included.

    Raises:
        ScheduleError: If there are no lengths, one is too long, or a planner is unknown.
    """
    length_K = validate_lengths(lengths, layout, cost)
    for name, value in (("lengths", length_K.size), ("batch", batch), ("steps", steps)):
        if value < 1:
            raise ScheduleError.at(name, value, "at least one is needed")
    left_out: dict[str, str] = {}
    requested = list(planners or known_planners())
    if not planners and batch > MAX_EXACT_SEQUENCES:
        requested.remove("milp")
        left_out["milp"] = (
            f"exact plans of more than {MAX_EXACT_SEQUENCES} sequences can take hours"
        )
    # dict.fromkeys: unique names in order, the baselines that the ratios divide by included.
    selected = {name: get_planner(name) for name in dict.fromkeys((*BASELINES, *requested))}
    totals = {name: PlannerTotals() for name in selected}
    bound_s = 0.0
    for batch_K in _batches(length_K, batch, steps, seed):
        bound_s += lower_bound(batch_K, layout, cost)
        for name, planner in selected.items():
            if name in left_out:
                continue
            # CPU time: other processes on the machine do not count.
            start_s = time.process_time()
            try:
                schedule = planner.plan(batch_K, layout, cost)
            except ScheduleError as error:
                # Sums over fewer steps are not comparable, so the earlier steps go too.
                left_out[name] = str(error)
                del totals[name]
                continue
            totals[name].add(schedule, cost, time.process_time() - start_s)
    return Comparison(layout, cost, batch, bound_s, totals, left_out)


def _batches(length_K: Ints, batch: int, steps: int, seed: int) -> Iterator[Ints]:
    """Yield the lengths of batches; all sequences are used once before any repeats."""
    rng = np.random.default_rng(seed)
    order = np.zeros(0, dtype=np.int64)
    for _ in range(steps):
        # A batch larger than the corpus needs several permutations.
        while order.size < batch:
            order = np.append(order, rng.permutation(length_K.size))
        yield length_K[order[:batch]]
        order = order[batch:]
