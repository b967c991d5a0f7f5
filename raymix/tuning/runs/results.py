"""What a run of a comparison came to, read from its directory."""

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
class Point:
    """Held-out losses after some step."""

    step: int
    tokens: int
    """Trained on so far."""
    flops: float
    """Floating-point operations of training so far."""
    extra_flops: float
    """Those of measuring for the mixer so far."""
    losses: Mapping[str, float]
    """Nats per token, by domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run."""

    mixer: str
    seed: int
    path: str
    state: State
    problem: str | None = None
    """What went wrong, if it failed."""
    seconds: float = 0.0
    """Spent in training steps."""
    extra_seconds: float = 0.0
    """Spent on measuring for the mixer."""
    shares: Mapping[str, float]
    """Mean share asked of each domain."""
    points: Sequence[Point] = ()
    """In order of steps."""

    @property
    def losses(self) -> Mapping[str, float]:
        """Return the final held-out losses of a finished run; nothing of any other."""
        return self.points[-1].losses if self.state == "done" and self.points else {}


def read_result(
    variant: Variant, state: State, *, flops_per_token: float, problem: str | None = None
) -> RunResult:
    """Return what the metrics of a run say.

    Args:
        variant: The run.
        state: How it ended.
        flops_per_token: Of training: forward and backward.
        problem: What went wrong, if it failed.
    """
    run = RunDirectory(Path(variant.recipe.run_dir))
    lines = list(read_metrics(run.metrics))
    clock = _Clock(lines)
    evaluations = {line["step"]: line["eval"] for line in lines if "eval" in line}
    last = clock.steps[-1] if clock.steps else 0
    return RunResult(
        mixer=variant.mixer,
        seed=variant.seed,
        path=str(run.path),
        state=state,
        problem=problem,
        seconds=clock.at(last)[1],
        extra_seconds=clock.at(last)[2],
        shares=requested_shares(run, last),
        points=tuple(
            _point(step, evaluations[step], clock, flops_per_token) for step in sorted(evaluations)
        ),
    )


def _point(
    step: int, table: Mapping[str, Mapping[str, Any]], clock: _Clock, flops_per_token: float
) -> Point:
    tokens, seconds, extra_seconds, extra_flops = clock.at(step)
    flops = flops_per_token * tokens
    # Time that was not counted in operations is turned into them at the run's own pace.
    paced = extra_seconds / seconds * flops if seconds else 0.0
    return Point(
        step=step,
        tokens=tokens,
        flops=flops,
        extra_flops=extra_flops + paced * (not extra_flops),
        losses={name: float(row["loss"]) for name, row in table.items()},
    )


class _Clock:
    """Tokens, seconds of training, and seconds and operations of probes, up to each step."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.steps: list[int] = []
        self._sums: list[tuple[int, float, float, float]] = []
        tokens, seconds, extra_seconds, extra_flops = 0, 0.0, 0.0, 0.0
        for line in lines:
            if "loss" in line:
                tokens, seconds = line["tokens"], seconds + (line.get("seconds") or 0.0)
            elif isinstance(probe := line.get("probe"), dict):
                extra_seconds += probe.get("seconds") or 0.0
                extra_flops += probe.get("flops") or 0.0
            else:
                continue
            self.steps.append(line["step"])
            self._sums.append((tokens, seconds, extra_seconds, extra_flops))

    def at(self, step: int) -> tuple[int, float, float, float]:
        """Return the sums after `step` steps and what was measured then."""
        at = bisect.bisect_right(self.steps, step)
        return self._sums[at - 1] if at else (0, 0.0, 0.0, 0.0)
