"""What a person sees while a comparison runs: one line on all runs, and one for each that ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from raymix._utils.formatting import clock
from raymix.training.run.progress import LiveConsole, MetricsTail, evaluation_line

_LINE_EVERY_S = 30.0
_MOST_NAMED = 4


@dataclass(slots=True)
class _Watched:
    """A run that is to be brought to its end."""

    tail: MetricsTail
    steps: int
    step: int | None = None
    """The newest step seen, None before the first."""
    first: int = 0
    """The step it began at this time."""
    said: str = ""
    """Its newest evaluation, in words."""
    state: str = "waiting"


class TrialsProgress(LiveConsole):
    """Shows a set of runs: a live line on a terminal, else a line now and then."""

    def __init__(
        self, runs: Mapping[str, tuple[Path, int]], *, done: int, stream: TextIO | None = None
    ) -> None:
        """Watch runs by name: path of their metrics, and steps; `done` more are done already."""
        super().__init__(stream)
        self._runs = {
            name: _Watched(MetricsTail(metrics), steps) for name, (metrics, steps) in runs.items()
        }
        self._before = done
        self._began = time.monotonic()
        self._due = self._began + _LINE_EVERY_S

    def update(self, states: Mapping[str, str], problems: Mapping[str, str]) -> None:
        """Show what is new.

        Args:
            states: `running`, `done`, `failed` or `stopped`, by run; absent while waiting.
            problems: What went wrong with the failed ones.
        """
        for name, run in self._runs.items():
            self._read(run)
            state = states.get(name, "waiting")
            if state != run.state:
                run.state = state
                self._changed(name, run, problems.get(name, ""))
        if not self.show(self._line()) and time.monotonic() >= self._due:
            self.say(self._line())
            self._due = time.monotonic() + _LINE_EVERY_S

    def _read(self, run: _Watched) -> None:
        for line in run.tail.read()[0]:
            if "eval" in line:
                run.said = evaluation_line(line["step"], line["eval"])
            elif "loss" in line:
                if run.step is None:
                    run.first = line["step"] - 1
                run.step = line["step"]

    def _changed(self, name: str, run: _Watched, problem: str) -> None:
        if run.state == "done":
            self.say(f"{name}: {run.said}" if run.said else f"{name}: done")
        elif run.state == "failed":
            self.say(f"{name}: failed: {problem}")

    def _line(self) -> str:
        states = [run.state for run in self._runs.values()]
        done = self._before + states.count("done")
        parts = [f"{done} of {self._before + len(states)} runs done"]
        parts += [f"{states.count(s)} {s}" for s in ("running", "failed") if states.count(s)]
        if "running" not in states:
            parts.append("waiting for room")
        eta = self._eta()
        if eta is not None:
            parts.append(f"{clock(eta)} to go")
        running = [(name, run) for name, run in self._runs.items() if run.state == "running"]
        words = [f"{name} {run.step or 0:,}/{run.steps:,}" for name, run in running[:_MOST_NAMED]]
        return "  ".join([", ".join(parts), *words])

    def _eta(self) -> float | None:
        """Return the seconds to go at the pace of all steps since the start."""
        made = sum((run.step or 0) - run.first for run in self._runs.values())
        left = sum(
            run.steps - (run.step or 0)
            for run in self._runs.values()
            if run.state in ("running", "waiting")
        )
        return (time.monotonic() - self._began) / made * left if made > 0 else None
