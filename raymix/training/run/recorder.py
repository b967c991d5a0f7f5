"""Records a run's metrics: one JSON object per step, trackers, gauges of the cluster."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raymix._utils.json import rounded
from raymix.training.run.checkpoint import disk_full
from raymix.training.run.gauges import Gauges
from raymix.training.run.rundir import RunDirectory
from raymix.training.run.trackers import Tracker

# Each point is encoded in Python; a small model has hundreds of steps per second.
_TRACKERS_INTERVAL_S = 0.2
_MAX_SHARES_PER_LINE = 100


class Recorder:
    """Appends to `metrics.jsonl` at once, and sends scalars to trackers.

    With more than 100 domains, a line leaves out the shares if its mixture version is that of the
    line before.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        trackers: Sequence[Tracker] = (),
        gauges: Gauges | None = None,
        scheduled: Mapping[str, Any] | None = None,
    ) -> None:
        """Append to the files of `run`.

        Args:
            run: The run directory.
            trackers: Experiment trackers, which are closed with the recorder.
            gauges: Gauges of the Ray cluster; None if nothing collects them.
            scheduled: Planner, layout and cost model of the document schedule, for reports.

        Raises:
            RecipeError: If the disk is full; so do all methods.
        """
        self._run = run
        self._gauges = gauges
        self._scheduled = dict(scheduled or {})
        self._trackers = trackers
        self._trackers_due_s = 0.0
        self._version: int | None = None
        with self._disk_errors():
            # Unbuffered and in append mode: each line is one write(2), so the driver that reads
            # along sees whole lines, and a killed worker loses none.
            self._file = run.metrics.open("ab", buffering=0)

    def step(self, line: Mapping[str, Any]) -> None:
        """Write the metrics of one step."""
        record = dict(line)
        shares: Mapping[str, float] = record.get("shares", {})
        # Ten thousand shares would make a line of 250 kB, the same one until the mixture changes.
        if len(shares) > _MAX_SHARES_PER_LINE and record["mixture_version"] == self._version:
            del record["shares"]
        self._version = record.get("mixture_version")
        self._write(record)
        if self._gauges is not None:
            self._gauges.step(line)
        if self._trackers and time.monotonic() >= self._trackers_due_s:
            self._trackers_due_s = time.monotonic() + _TRACKERS_INTERVAL_S
            scalars = {
                f"train/{key}": line[key]
                for key in ("loss", "lr", "tokens_per_s", "data_wait", "grad_norm", "mfu")
                if line.get(key) is not None
            }
            # They draw one chart per name.
            if len(shares) <= _MAX_SHARES_PER_LINE:
                scalars |= {f"shares/{name}": share for name, share in shares.items()}
            self._add_scalars(line["step"], scalars)

    def evaluation(self, step: int, table: Mapping[str, Mapping[str, float | int | None]]) -> None:
        """Write the held-out losses after `step` steps."""
        self._write({"step": step, "eval": table})
        if self._gauges is not None:
            self._gauges.evaluation(table)
        losses = {f"eval/{name}": row["loss"] for name, row in table.items()}
        self._add_scalars(step, {name: loss for name, loss in losses.items() if loss is not None})

    def lengths(self, step: int, length_N: npt.NDArray[np.integer]) -> None:
        """Write the document lengths, shape (N,), of steps 1, 2, 4, 8, ..., for reports."""
        # Powers of two: a long run's file stays small, and the first steps are all in it.
        if step & (step - 1):
            return
        line = {**self._scheduled, "step": step, "lengths": length_N.tolist()}
        text = json.dumps(line, separators=(",", ":"), default=_python_scalar)
        with self._disk_errors(), self._run.schedule.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def probe(self, step: int, seconds: float) -> None:
        """Write the seconds that the gradient probe after `step` steps took."""
        self._write({"step": step, "probe": {"seconds": rounded(seconds)}})
        self._add_scalars(step, {"train/probe_seconds": seconds})

    def checkpoint(self, step: int, seconds: float) -> None:
        """Write that a checkpoint after `step` steps is whole, and the seconds that it took.

        By this line a later start knows that there was one, should its files be gone.
        """
        self._write({"step": step, "checkpoint": {"seconds": rounded(seconds)}})

    def close(self) -> None:
        """Flush and close the files."""
        with self._disk_errors():
            self._file.close()
            for tracker in self._trackers:
                tracker.close()

    def _add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        with self._disk_errors():
            for tracker in self._trackers:
                tracker.scalars(step, scalars)

    def _write(self, line: Mapping[str, Any]) -> None:
        # `allow_nan=False`: Python would write NaN, which is not JSON and which other tools reject
        text = json.dumps(line, separators=(",", ":"), allow_nan=False, default=_python_scalar)
        with self._disk_errors():
            self._file.write(text.encode() + b"\n")

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Raise a full disk as a RecipeError."""
        try:
            yield
        except OSError as error:
            raise disk_full(error, self._run.path) from error


def _python_scalar(value: object) -> object:
    # NumPy scalars, which `json` does not know.
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a line of metrics")
