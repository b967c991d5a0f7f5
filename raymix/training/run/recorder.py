"""Where a run's numbers go: one JSON object per step, TensorBoard, the cluster's gauges."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raymix._utils.json import rounded
from raymix.training.run.checkpoint import disk_full
from raymix.training.run.gauges import Gauges
from raymix.training.run.rundir import RunDirectory

if TYPE_CHECKING:
    from raymix.training.run.event_file import EventFileWriter

_BOARD_INTERVAL_S = 0.2
_MOST_SHARES_EACH_STEP = 100


class Recorder:
    """Appends to `metrics.jsonl`, a line as soon as it is known, and to TensorBoard's files.

    Under more than 100 domains the shares are left out of lines that have the same mixture
    version as the line before.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        start_step: int,
        tensorboard: bool,
        gauges: Gauges | None = None,
        scheduled: Mapping[str, Any] | None = None,
    ) -> None:
        """Append to the files of `run`.

        Args:
            run: Its directory.
            start_step: The step that a resumed run starts from.
            tensorboard: Whether to write for TensorBoard.
            scheduled: Planner, layout and cost model that documents are dealt out by.
            gauges: What tells the cluster; None where there is none that listens.

        Raises:
            RecipeError: If the disk is full; so do all methods.
        """
        self._run = run
        self._gauges = gauges
        self._scheduled = dict(scheduled or {})
        self._board: EventFileWriter | None = None
        self._board_due = 0.0
        self._version: int | None = None
        with self._told():
            # Unbuffered: the driver reads along, and a killed worker loses nothing.
            self._file = run.metrics.open("ab", buffering=0)
            if tensorboard:
                from raymix.training.run.event_file import EventFileWriter

                self._board = EventFileWriter(run.path / "tensorboard", start_step=start_step)

    def step(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of one step."""
        kept = dict(line)
        shares: Mapping[str, float] = kept.get("shares", {})
        if len(shares) > _MOST_SHARES_EACH_STEP and kept["mixture_version"] == self._version:
            del kept["shares"]
        self._version = kept.get("mixture_version")
        self._write(kept)
        if self._gauges is not None:
            self._gauges.step(line)
        if self._board is not None and time.monotonic() >= self._board_due:
            self._board_due = time.monotonic() + _BOARD_INTERVAL_S
            numbers = {
                f"train/{key}": line[key]
                for key in ("loss", "lr", "tokens_per_s", "data_wait", "grad_norm", "mfu")
                if line.get(key) is not None
            }
            if len(shares) <= _MOST_SHARES_EACH_STEP:
                numbers |= {f"shares/{name}": share for name, share in shares.items()}
            self._show(line["step"], numbers)

    def evaluation(self, step: int, table: Mapping[str, Mapping[str, float | int | None]]) -> None:
        """Write the held-out losses after `step` steps."""
        self._write({"step": step, "eval": table})
        if self._gauges is not None:
            self._gauges.evaluation(table)
        losses = {f"eval/{name}": row["loss"] for name, row in table.items()}
        self._show(step, {name: loss for name, loss in losses.items() if loss is not None})

    def lengths(self, step: int, length_N: npt.NDArray[np.integer]) -> None:
        """Write the documents of a step where reports show its schedule: steps 1, 2, 4, 8, ..."""
        if step & (step - 1):
            return
        line = {**self._scheduled, "step": step, "lengths": length_N.tolist()}
        text = json.dumps(line, separators=(",", ":"), default=_finite)
        with self._told(), self._run.schedule.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def probe(self, step: int, seconds: float) -> None:
        """Write what measuring gradients after `step` steps took."""
        self._write({"step": step, "probe": {"seconds": rounded(seconds)}})
        self._show(step, {"train/probe_seconds": seconds})

    def close(self) -> None:
        """Flush and close the files."""
        with self._told():
            self._file.close()
            if self._board is not None:
                self._board.close()

    def _show(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._board is not None:
            with self._told():
                for name, value in numbers.items():
                    self._board.scalar(name, value, step)

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"), allow_nan=False, default=_finite)
        with self._told():
            self._file.write(text.encode() + b"\n")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Have a full disk told in the words of the house."""
        try:
            yield
        except OSError as error:
            raise disk_full(error, self._run.path) from error


def _finite(value: object) -> object:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a line of metrics")
