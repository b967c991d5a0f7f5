"""Console progress of a group of runs: one line on all runs, one line per run that ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from raymix._utils.formatting import clock
from raymix.training.run.progress import LiveConsole, MetricsTail, evaluation_line

_LINE_INTERVAL_S = 30.0
# A terminal line has space for a few names beside the counts.
_MAX_NAMES = 4


@dataclass(slots=True)
class _Watched:
    """A run that this call starts or resumes."""

    tail: MetricsTail
    steps: int
    step: int | None = None
    """The newest step seen, None before the first."""
    start_step: int = 0
    """The step at which this call started or resumed it."""
    evaluation: str = ""
    """Its newest evaluation, formatted."""
    state: str = "waiting"


class TrialsProgress(LiveConsole):
    """Progress of a set of runs: a live line on a terminal, else a line every 30 seconds."""

    def __init__(
        self, runs: Mapping[str, tuple[Path, int]], *, done: int, stream: TextIO | None = None
    ) -> None:
        """Watch runs by name: path of their metrics, and steps; `done` counts those done before."""
        super().__init__(stream)
        self._runs = {
            name: _Watched(MetricsTail(metrics), steps) for name, (metrics, steps) in runs.items()
        }
        self._done_before = done
        self._started = time.monotonic()
        self._next_line = self._started + _LINE_INTERVAL_S

    def update(self, states: Mapping[str, str], problems: Mapping[str, str]) -> None:
        """Read new metrics and show the changes.

        Args:
            states: `running`, `done`, `failed` or `stopped`, by run; absent while waiting.
            problems: Reasons of the failed runs, by run.
        """
        for name, run in self._runs.items():
            self._read(run)
            state = states.get(name, "waiting")
            if state != run.state:
                run.state = state
                self._show_change(name, run, problems.get(name, ""))
        # `show` is False where the output is no terminal: a log gets a line only now and then.
        if not self.show(self._line()) and time.monotonic() >= self._next_line:
            self.say(self._line())
            self._next_line = time.monotonic() + _LINE_INTERVAL_S

    def _read(self, run: _Watched) -> None:
        for line in run.tail.read()[0]:
            if "eval" in line:
                run.evaluation = evaluation_line(line["step"], line["eval"])
            elif "loss" in line:
                # A resumed run starts at its checkpoint: earlier steps are no work of this call.
                if run.step is None:
                    run.start_step = line["step"] - 1
                run.step = line["step"]

    def _show_change(self, name: str, run: _Watched, problem: str) -> None:
        if run.state == "done":
            self.say(f"{name}: {run.evaluation}" if run.evaluation else f"{name}: done")
        elif run.state == "failed":
            self.say(f"{name}: failed: {problem}")

    def _line(self) -> str:
        states = [run.state for run in self._runs.values()]
        done = self._done_before + states.count("done")
        parts = [f"{done} of {self._done_before + len(states)} runs done"]
        parts += [f"{states.count(s)} {s}" for s in ("running", "failed") if states.count(s)]
        if "running" not in states:
            parts.append("waiting for resources")
        eta = self._eta()
        if eta is not None:
            parts.append(f"{clock(eta)} to go")
        running = [(name, run) for name, run in self._runs.items() if run.state == "running"]
        labels = [f"{name} {run.step or 0:,}/{run.steps:,}" for name, run in running[:_MAX_NAMES]]
        return "  ".join([", ".join(parts), *labels])

    def _eta(self) -> float | None:
        """Return the remaining seconds at the pace of all steps so far; None before the first."""
        # The pace of all runs together, so it holds for any number of runs at once.
        steps_made = sum((run.step or 0) - run.start_step for run in self._runs.values())
        steps_left = sum(
            run.steps - (run.step or 0)
            for run in self._runs.values()
            if run.state in ("running", "waiting")
        )
        return (
            (time.monotonic() - self._started) / steps_made * steps_left if steps_made > 0 else None
        )
