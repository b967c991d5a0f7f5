"""A run as it goes on, read from its files alone: any machine that sees them can watch.

`LiveRun` takes in the lines that were added to the metrics since the last look, so that a look
costs what is new, not what there is. A run that is started again puts a new file in the place of
the old one: everything is then read afresh.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raymix.jsontext import parse_json
from raymix.report.data.exactness import usable_tokens
from raymix.report.data.read import LOG, METRICS, fetch_run, outline
from raymix.report.data.steps import Document, is_step, number
from raymix.store.mirror import SHORTEST_S, Mirror
from raymix.store.tail import LineTail
from raymix.store.trouble import is_remote

_PACE_STEPS = 50
_CURVE_POINTS = 400
_SMOOTHING = 0.9


class LiveRun:
    """What the files of a run say, brought up to date by `look`."""

    def __init__(self, path: str | Path) -> None:
        """Watch the run directory at `path`, or the URL of one; its first step may be yet to come.

        Raises:
            RecipeError: If there is no such directory, or it is no run's.
            StorageError: If it is a URL and the store cannot be used.
        """
        self._where = str(path).rstrip("/") if is_remote(str(path)) else str(path)
        self._path, self._mirror = Path(path), None
        if is_remote(self._where):
            self._above = tempfile.TemporaryDirectory(prefix="raymix-")
            self._path = Path(self._above.name) / self._where.rsplit("/", 1)[-1]
            self._mirror = Mirror(self._where, self._path)
            fetch_run(self._where, self._mirror)
        self._fetched = time.monotonic()
        self._open()
        self._tail = LineTail(self._path / METRICS)
        self._log = LineTail(self._path / LOG)
        self._forget()

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self._about.name

    @property
    def steps(self) -> int | None:
        """Return how many steps the run is to have, None where nothing says so."""
        planned = self._about.environment.get("steps")
        return planned if isinstance(planned, int) else None

    @property
    def finished(self) -> bool:
        """Return whether the last step is done and scored, as training does at its end."""
        return self.steps is not None and self._step >= self.steps and self._scored >= self.steps

    def look(self) -> bool:
        """Take in what is new; return whether anything is."""
        if self._mirror is not None and time.monotonic() - self._fetched >= SHORTEST_S:
            fetch_run(self._where, self._mirror)
            self._fetched = time.monotonic()
        lines, afresh = self._tail.read()
        if afresh:
            self._forget()
            self._open()
        new = False
        for line in _objects(lines):
            self._take(line)
            new = True
        for entry in _objects(self._log.read()[0]):
            stats = entry.get("stats")
            self._stats = stats if isinstance(stats, dict) else self._stats
        return new

    def document(self) -> Document:
        """Return the state in JSON types: for `--json`, and what `dashboard` draws."""
        seconds = sum(number(line.get("seconds")) for line in self._recent)
        tokens = sum(_tokens(line) for line in self._recent)
        left = None if self.steps is None else max(0, self.steps - self._step)
        per_step = seconds / len(self._recent) if self._recent else math.nan
        return {
            "run": self._where,
            "name": self.name,
            "state": self._state(),
            "step": self._step,
            "steps": self.steps,
            "tokens": self._newest.get("tokens"),
            "loss": _plain(self._loss),
            "lr": self._newest.get("lr"),
            "tokens_per_s": _plain(tokens / seconds if seconds > 0 else math.nan),
            "data_wait": _plain(self._waiting(seconds)),
            "seconds_left": None if left is None else _plain(left * per_step),
            "silent_s": round(self._tail.age(), 1),
            "mixture_version": self._newest.get("mixture_version"),
            "loss_curve": [_plain(value) for value in self._curve],
            "domains": {name: self._domain(at, name) for at, name in enumerate(self._domains())},
        }

    def _open(self) -> None:
        self._about = outline(self._path)
        names = self._about.domains
        self._usable = {name: usable_tokens(self._about, name) for name in names}

    def _forget(self) -> None:
        self._step, self._scored, self._loss = 0, -1, math.nan
        self._newest: Document = {}
        self._shares: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._losses: dict[str, float] = {}
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._stats: Document = {}
        self._recent: deque[Document] = deque(maxlen=_PACE_STEPS)
        self._curve: list[float] = []
        self._stride, self._since = 1, 0

    def _take(self, line: Document) -> None:
        if not is_step(line.get("step")):
            return
        table = line.get("eval")
        if isinstance(table, dict):
            self._first = self._first or table
            self._last, self._scored = table, line["step"]
        if "loss" not in line:
            return
        self._step, self._newest = line["step"], line
        self._recent.append(line)
        self._loss = _smooth(self._loss, number(line["loss"]))
        self._bend(self._loss)
        self._shares = _mapping(line, "shares") or self._shares
        for name, count in _mapping(line, "counts").items():
            self._counts[name] = self._counts.get(name, 0.0) + number(count)
        for name, loss in _mapping(line, "domain_loss").items():
            self._losses[name] = _smooth(self._losses.get(name, math.nan), number(loss))

    def _bend(self, loss: float) -> None:
        """Add a point to the curve, which keeps every second one whenever it grows too long."""
        self._since += 1
        if self._since < self._stride:
            return
        self._since = 0
        self._curve.append(loss)
        if len(self._curve) > _CURVE_POINTS:
            self._curve, self._stride = self._curve[1::2], 2 * self._stride

    def _state(self) -> str:
        if not self._newest:
            return "waiting for the first step"
        if self.finished:
            return "finished"
        # A step may be slow; what is silent for twenty of them is more than that.
        pace = sum(number(line.get("seconds")) for line in self._recent) / len(self._recent)
        return "running" if self._tail.age() < max(30.0, 20 * pace) else "silent"

    def _waiting(self, seconds: float) -> float:
        waits = [number(line.get("data_wait")) * number(line.get("seconds"))
                 for line in self._recent]  # fmt: skip
        return sum(waits) / seconds if seconds > 0 else math.nan

    def _domains(self) -> tuple[str, ...]:
        return self._about.domains or tuple({**self._shares, **self._last})

    def _domain(self, at: int, name: str) -> Document:
        read, total = self._counts.get(name, 0.0), sum(self._counts.values())
        usable = self._usable.get(name)
        return {
            "share_asked": _plain(number(self._shares.get(name))),
            "share_realised": _plain(read / total if total else math.nan),
            "tokens": int(read),
            "epochs": _plain(read / usable if usable else math.nan),
            "loss": _plain(self._losses.get(name, math.nan)),
            "heldout_first": _plain(_score(self._first, name)),
            "heldout_last": _plain(_score(self._last, name)),
            "grad_norm2": _plain(self._signal("grad_norm2", at)),
            "grad_noise": _plain(self._signal("grad_noise", at)),
        }

    def _signal(self, kind: str, at: int) -> float:
        values = self._stats.get(kind)
        return number(values[at]) if isinstance(values, list) and at < len(values) else math.nan


def _objects(lines: Iterable[bytes]) -> Iterator[Document]:
    """Yield the objects of JSON lines; damaged ones are left out."""
    for raw in lines:
        with suppress(ValueError):
            line = parse_json(raw)
            if isinstance(line, dict):
                yield line


def _mapping(line: Document, key: str) -> dict[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def _tokens(line: Document) -> float:
    return number(line.get("tokens_per_s")) * number(line.get("seconds"))


def _smooth(old: float, new: float) -> float:
    if math.isnan(old) or math.isnan(new):
        return old if math.isnan(new) else new
    return _SMOOTHING * old + (1 - _SMOOTHING) * new


def _score(table: dict[str, Any], name: str) -> float:
    row = table.get(name)
    return number(row.get("loss")) if isinstance(row, dict) else math.nan


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
