"""Console output of a run: a live line or lines now and then, read from the run's metrics.

It needs nothing but the metrics file, so it is the same for a run in this process, on Ray, and on
other machines.
"""

from __future__ import annotations

import sys
import time
import zlib
from array import array
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.status import Status

from raymix._utils.formatting import clock, short
from raymix._utils.json import parse_json
from raymix.store.remote.tail import LineTail

_LINE_INTERVAL_S = 10.0
_INITIAL_LINES = 3
_MAX_SHARES = 4
_MAX_DOMAINS = 12
# Steps over which throughput is averaged: enough to smooth an evaluation, few enough to follow a
# change of speed.
_THROUGHPUT_STEPS = 50


class MetricsTail:
    """Reads the lines that were added to a metrics file since the last read.

    A restarted run replaces the file: the new one begins with the old lines up to a checkpoint,
    and the lines after these are new.
    """

    def __init__(self, path: Path) -> None:
        """Start after the present lines of the file at `path`."""
        self._tail = LineTail(path)
        # Four bytes per line instead of its text: a long run has millions of lines.
        self._seen = array("I")
        lines, _ = self._tail.read()
        self._seen.extend(map(zlib.crc32, lines))

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the new lines, and whether a new file replaced one with more lines."""
        lines, replaced = self._tail.read()
        previous = self._seen if replaced else array("I")
        if replaced:
            self._seen = array("I")
        new: list[dict[str, Any]] = []
        n_common = 0
        for line in lines:
            checksum = zlib.crc32(line)
            self._seen.append(checksum)
            # By content and not by step: the restarted run writes the same steps again, and the
            # lines of these differ in their times.
            if not new and n_common < len(previous) and previous[n_common] == checksum:
                n_common += 1
            else:
                new.append(parse_json(line))
        return new, n_common < len(previous)


class LiveConsole:
    """Permanent lines and, on a terminal, one live line below them; a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Print to `stream`, standard output by default."""
        self.console = Console(file=stream or sys.stdout, highlight=False)
        self._live: Status | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = self.console.status("", spinner="dots")
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        # Names of domains and paths may have square brackets, which rich would take for markup.
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self, text: str) -> bool:
        """Set the live line to `text`, cut to one line; return whether there is a live line."""
        if self._live is None:
            return False
        # The spinner and its margin take the rest; a wrapped live line would leave copies behind.
        width = self.console.width - 4
        self._live.update(text if len(text) <= width else f"{text[: width - 1]}…")
        return True


class RunProgress(LiveConsole):
    """Shows a run: a live line on a terminal, else a line every ten seconds.

    `poll` is called a few times a second.
    """

    def __init__(self, metrics: Path, *, steps: int, stream: TextIO | None = None) -> None:
        """Watch the metrics file at `metrics` of a run of `steps` steps."""
        super().__init__(stream)
        self._tail = MetricsTail(metrics)
        self._steps = steps
        self._recent: deque[dict[str, Any]] = deque(maxlen=_THROUGHPUT_STEPS)
        self._lines_printed = 0
        self._due_s = 0.0
        self._shown_step = self._first_step = -1
        self.last_step: int | None = None
        """The newest step seen, None before the first."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.poll()
        super().__exit__(kind, value, trace)
        newest = self._recent[-1] if self._recent else None
        if newest is not None and newest["step"] != self._shown_step:
            self._print(newest)

    def waiting(self, text: str) -> None:
        """Show `text` in the live line, if there is one, until the first step."""
        if self.last_step is None:
            self.show(text)

    def poll(self) -> None:
        """Show the lines added to the metrics since the last call."""
        lines, replaced = self._tail.read()
        if replaced and self.last_step is not None:
            self._recent.clear()
            self.say("The workers were restarted and resume from the last checkpoint.")
        for line in lines:
            if "eval" in line:
                self.say(evaluation_line(line["step"], line["eval"]))
            elif "loss" in line:
                self._step(line)
            if "skipped" in line:
                self.say(f"step {line['step']} was left out: {line['skipped']}")

    def _step(self, line: dict[str, Any]) -> None:
        if "note" in line:
            self.say(f"step {line['step']}: {line['note']}")
        if not self._recent:
            self._first_step = line["step"]
        self._recent.append(line)
        self.last_step = line["step"]
        if self.show(self._text(line)):
            return
        now = time.monotonic()
        # The first lines show soon that the run works; then one at an interval keeps logs short.
        if self._lines_printed < _INITIAL_LINES or now >= self._due_s:
            self._print(line)
            self._due_s = now + _LINE_INTERVAL_S

    def _print(self, line: dict[str, Any]) -> None:
        self._lines_printed += 1
        self._shown_step = line["step"]
        self.say(self._text(line))

    def _text(self, line: Mapping[str, Any]) -> str:
        # The first step of an attempt waits for the first blocks and for kernels to be compiled, so
        # its duration says nothing about the steps to come.
        warm = [step for step in self._recent if step["step"] != self._first_step]
        if not warm:
            return step_line(line, steps=self._steps, tokens_per_s=None, eta_s=None)
        seconds = sum(float(step["seconds"]) for step in warm)
        tokens = sum(float(step["tokens_per_s"]) * float(step["seconds"]) for step in warm)
        return step_line(
            line,
            steps=self._steps,
            tokens_per_s=tokens / seconds,
            eta_s=seconds / len(warm) * (self._steps - line["step"]),
        )


def step_line(
    line: Mapping[str, Any], *, steps: int, tokens_per_s: float | None, eta_s: float | None
) -> str:
    """Return one step as a line of text.

    Args:
        line: The step's object in the metrics.
        steps: Steps of the whole run.
        tokens_per_s: Throughput over the last steps; None before there are any.
        eta_s: Estimated seconds left; None if unknown.
    """
    width = len(f"{steps:,}")
    parts = [
        f"step {line['step']:>{width},}/{steps:,}",
        f"train loss {line['loss']:.4f}",
        f"lr {line['lr']:.2e}",
        f"took {line['seconds']:.3g} s" if tokens_per_s is None else f"{short(tokens_per_s)} tok/s",
    ]
    if "mfu" in line:
        parts.append(f"mfu {100 * line['mfu']:.1f}%")
    parts.append(f"wait {100 * (line.get('data_wait') or 0.0):.1f}%")
    if eta_s is not None:
        parts.append(f"{clock(eta_s)} to go")
    if "shares" in line:
        parts.append(shares_text(line["shares"]))
    return "  ".join(parts)


def shares_text(shares: Mapping[str, float]) -> str:
    """Return the largest shares as text, and the number of those left out."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    # "+1" would be no shorter than the one share that it stands for.
    shown = ranked if len(ranked) <= _MAX_SHARES + 1 else ranked[:_MAX_SHARES]
    parts = [f"{name} {100 * share:.3g}%" for name, share in shown]
    n_omitted = len(ranked) - len(shown)
    return " ".join([*parts, *([f"+{n_omitted}"] if n_omitted else [])])


def evaluation_line(step: int, table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return an evaluation as a line of text: nats per token by domain, and their mean."""
    if not table:
        return f"held-out after {step:,} steps: no domain has held-out text"
    losses = {name: float(row["loss"]) for name, row in table.items()}
    mean = sum(losses.values()) / len(losses)
    head = f"held-out loss after {step:,} steps: mean {mean:.4f}"
    if len(losses) <= _MAX_DOMAINS:
        return f"{head}; " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    extremes = f"{best} {losses[best]:.3f} to {worst} {losses[worst]:.3f}"
    return f"{head} over {len(losses)} domains, {extremes}"
