"""Result of one run, read from the metrics in its directory: losses, cost and mean shares.

`extra` is the cost of measuring for an adaptive mixer (probes), apart from training itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.training.summary import requested_shares
from raymix.tuning.runs.variants import Variant

State = Literal["done", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPoint:
    """Held-out losses after a step, and the cost up to it."""

    step: int
    tokens: int
    """Training tokens up to this step."""
    flops: float
    """Floating-point operations of training up to this step."""
    extra_flops: float
    """Floating-point operations of the mixer's probes up to this step."""
    losses: Mapping[str, float]
    """Nats per token, by domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """State, cost, mean shares and evaluations of one run."""

    mixer: str
    seed: int
    path: str
    state: State
    problem: str | None = None
    """Reason, if it failed."""
    seconds: float = 0.0
    """Time in training steps."""
    extra_seconds: float = 0.0
    """Time in the mixer's probes."""
    shares: Mapping[str, float]
    """Mean requested share, by domain."""
    points: Sequence[EvaluationPoint] = ()
    """Evaluations, in order of steps."""

    @property
    def losses(self) -> Mapping[str, float]:
        """Return the final held-out losses of a finished run; empty for any other."""
        return self.points[-1].losses if self.state == "done" and self.points else {}


def read_result(
    variant: Variant, state: State, *, flops_per_token: float, problem: str | None = None
) -> RunResult:
    """Return the result of a run from its metrics file.

    Args:
        variant: The run.
        state: How it ended.
        flops_per_token: Of training, forward and backward pass.
        problem: Reason, if it failed.
    """
    run = RunDirectory(Path(variant.recipe.run_dir))
    lines = list(read_metrics(run.metrics))
    totals = _RunningTotals(lines)
    # A resumed run may evaluate a step again: the later line counts.
    evaluations = {line["step"]: line["eval"] for line in lines if "eval" in line}
    last = totals.steps[-1] if totals.steps else 0
    return RunResult(
        mixer=variant.mixer,
        seed=variant.seed,
        path=str(run.path),
        state=state,
        problem=problem,
        seconds=totals.at(last)[1],
        extra_seconds=totals.at(last)[2],
        shares=requested_shares(run, last),
        points=tuple(
            _point(step, evaluations[step], totals, flops_per_token) for step in sorted(evaluations)
        ),
    )


def _point(
    step: int,
    table: Mapping[str, Mapping[str, Any]],
    totals: _RunningTotals,
    flops_per_token: float,
) -> EvaluationPoint:
    tokens, seconds, extra_seconds, extra_flops = totals.at(step)
    flops = flops_per_token * tokens
    # Some probes report seconds but no operations: convert at the training pace of this run.
    converted = extra_seconds / seconds * flops if seconds else 0.0
    return EvaluationPoint(
        step=step,
        tokens=tokens,
        flops=flops,
        extra_flops=extra_flops + converted * (not extra_flops),
        losses={name: float(row["loss"]) for name, row in table.items()},
    )


class _RunningTotals:
    """Running totals by step: tokens, seconds of training, seconds and operations of probes."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.steps: list[int] = []
        self._sums: list[tuple[int, float, float, float]] = []
        tokens, seconds, extra_seconds, extra_flops = 0, 0.0, 0.0, 0.0
        for line in lines:
            if "loss" in line:
                # `tokens` in the metrics is a running total already; seconds are per line.
                tokens, seconds = line["tokens"], seconds + (line.get("seconds") or 0.0)
            elif isinstance(probe := line.get("probe"), dict):
                extra_seconds += probe.get("seconds") or 0.0
                extra_flops += probe.get("flops") or 0.0
            else:
                continue
            self.steps.append(line["step"])
            self._sums.append((tokens, seconds, extra_seconds, extra_flops))

    def at(self, step: int) -> tuple[int, float, float, float]:
        """Return the totals up to `step`, probes at that step included."""
        # Right: several lines may have the same step, and the last one holds its total.
        end = bisect.bisect_right(self.steps, step)
        return self._sums[end - 1] if end else (0, 0.0, 0.0, 0.0)
