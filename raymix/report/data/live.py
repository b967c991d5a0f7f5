"""Live state of a run, read from its files alone, so that any machine that sees them can watch.

`LiveRun.poll` parses only the lines added since the last poll. A run that is resumed replaces its
metrics file by one that ends at the checkpoint: everything is then read again.
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

from raymix._utils.json import parse_json
from raymix.report.data.exactness import usable_tokens
from raymix.report.data.losses import RECENT_STEPS, RecentLosses
from raymix.report.data.read import LOG, METRICS, fetch_run, outline
from raymix.report.data.steps import Document, is_step, number
from raymix.store.remote.errors import is_remote
from raymix.store.remote.mirror import MIN_PAUSE_S, Mirror
from raymix.store.remote.tail import LineTail

_CURVE_POINTS = 400
_SILENT_AFTER_S = 30.0


class LiveRun:
    """The state of a run, updated by `poll`."""

    def __init__(self, path: str | Path) -> None:
        """Open the run directory at `path`, or at a URL; it may have no step yet.

        Raises:
            RecipeError: If there is no such directory, or it is no run's.
            StorageError: If it is a URL and the store cannot be used.
        """
        self._source = str(path).rstrip("/") if is_remote(str(path)) else str(path)
        self._path, self._mirror = Path(path), None
        if is_remote(self._source):
            # Stored, as the directory is removed together with this object.
            self._copy = tempfile.TemporaryDirectory(prefix="raymix-")
            self._path = Path(self._copy.name) / self._source.rsplit("/", 1)[-1]
            self._mirror = Mirror(self._source, self._path)
            fetch_run(self._source, self._mirror)
        self._fetched = time.monotonic()
        self._open()
        self._tail = LineTail(self._path / METRICS)
        self._log = LineTail(self._path / LOG)
        self._reset()

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self._outline.name

    @property
    def steps(self) -> int | None:
        """Return the planned number of steps, None where it is unknown."""
        planned = self._outline.environment.get("steps")
        return planned if isinstance(planned, int) else None

    @property
    def finished(self) -> bool:
        """Return whether the last step is trained and evaluated, which is how training ends."""
        return self.steps is not None and self._step >= self.steps and self._scored >= self.steps

    def poll(self) -> bool:
        """Read the lines added since the last poll; return whether there were any."""
        # Every request to a store costs time and money, however often one polls.
        if self._mirror is not None and time.monotonic() - self._fetched >= MIN_PAUSE_S:
            fetch_run(self._source, self._mirror)
            self._fetched = time.monotonic()
        lines, replaced = self._tail.read()
        if replaced:
            # A run that was deleted and started again may have another recipe, too.
            self._reset()
            self._open()
        new = False
        for line in _objects(lines):
            self._add(line)
            new = True
        for entry in _objects(self._log.read()[0]):
            # Entries of a schedule or of the user carry no statistics: the last measured ones stay,
            # unless the domains change, which replaces them and says so.
            stats = entry.get("stats")
            self._stats = stats if isinstance(stats, dict) else self._stats
        return new

    def document(self) -> Document:
        """Return the state in JSON types, for `--json` and the dashboard.

        `loss` is the training loss of the newest step, `loss_mean` that of the last
        `loss_mean_steps` steps; throughput and waiting are over the last steps, too. Losses are
        in nats per token.
        """
        seconds = sum(number(line.get("seconds")) for line in self._recent)
        tokens = sum(_tokens(line) for line in self._recent)
        left = None if self.steps is None else max(0, self.steps - self._step)
        per_step = seconds / len(self._recent) if self._recent else math.nan
        return {
            "run": self._source,
            "name": self.name,
            "state": self._state(),
            "step": self._step,
            "steps": self.steps,
            "tokens": self._newest.get("tokens"),
            "loss": _plain(number(self._newest.get("loss"))),
            "loss_mean": _plain(self._losses.mean()),
            "loss_mean_steps": len(self._losses),
            "lr": self._newest.get("lr"),
            "tokens_per_s": _plain(tokens / seconds if seconds > 0 else math.nan),
            "data_wait": _plain(self._data_wait(seconds)),
            "seconds_left": None if left is None else _plain(left * per_step),
            "silent_s": round(self._tail.age(), 1),
            "mixture_version": self._newest.get("mixture_version"),
            "heldout_step": self._scored if self._scored >= 0 else None,
            "loss_curve": [_plain(value) for value in self._curve],
            "domains": {name: self._domain(at, name) for at, name in enumerate(self._domains())},
        }

    def _open(self) -> None:
        self._outline = outline(self._path)
        names = self._outline.domains
        self._usable = {name: usable_tokens(self._outline, name) for name in names}

    def _reset(self) -> None:
        self._step, self._scored = 0, -1
        self._newest: Document = {}
        self._shares: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        self._tokens = 0.0
        self._losses = RecentLosses()
        self._domain_losses: dict[str, RecentLosses] = {}
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._stats: Document = {}
        self._recent: deque[Document] = deque(maxlen=RECENT_STEPS)
        self._curve: list[float] = []
        self._stride, self._since = 1, 0

    def _add(self, line: Document) -> None:
        if not is_step(line.get("step")):
            return
        table = line.get("eval")
        if isinstance(table, dict):
            # By domain: one that was added is scored when it comes.
            self._first = {**table, **self._first}
            self._last, self._scored = table, line["step"]
        if "loss" not in line:
            return
        self._step, self._newest = line["step"], line
        # Only the last lines are stored: a run may have millions.
        self._recent.append(line)
        self._losses.add(self._step, number(line["loss"]))
        self._add_to_curve()
        self._shares = _mapping(line, "shares") or self._shares
        self._add_asked(number(line.get("tokens")))
        for name, count in _mapping(line, "counts").items():
            self._counts[name] = self._counts.get(name, 0.0) + number(count)
        for name, loss in _mapping(line, "domain_loss").items():
            self._domain_losses.setdefault(name, RecentLosses()).add(self._step, number(loss))

    def _add_asked(self, tokens: float) -> None:
        """Add the tokens requested by the newest step, which ends at `tokens` in all."""
        if not math.isfinite(tokens):
            return
        for name, share in self._shares.items():
            # Weighted by the step's size, so that the mean share is that of a report.
            amount = number(share) * (tokens - self._tokens)
            self._asked[name] = self._asked.get(name, 0.0) + amount
        self._tokens = tokens

    def _add_to_curve(self) -> None:
        """Append the recent training loss, dropping every second point of a curve too long."""
        self._since += 1
        if self._since < self._stride:
            return
        self._since = 0
        self._curve.append(self._losses.mean())
        if len(self._curve) > _CURVE_POINTS:
            self._curve, self._stride = self._curve[1::2], 2 * self._stride

    def _state(self) -> str:
        if not self._newest:
            return "waiting for the first step"
        if self.finished:
            return "finished"
        # Evaluations and checkpoints stand between two lines, so one slow step is no silence.
        pace = sum(number(line.get("seconds")) for line in self._recent) / len(self._recent)
        return "running" if self._tail.age() < max(_SILENT_AFTER_S, 20 * pace) else "silent"

    def _data_wait(self, seconds: float) -> float:
        # Weighted by duration: a long step that waited counts as the time it took.
        waits = [
            number(line.get("data_wait")) * number(line.get("seconds")) for line in self._recent
        ]
        return sum(waits) / seconds if seconds > 0 else math.nan

    def _domains(self) -> tuple[str, ...]:
        return self._outline.domains or tuple({**self._shares, **self._last})

    def _domain(self, at: int, name: str) -> Document:
        read, total = self._counts.get(name, 0.0), sum(self._counts.values())
        asked, all_asked = self._asked.get(name, math.nan), sum(self._asked.values())
        usable = self._usable.get(name)
        return {
            "share_asked": _plain(number(self._shares.get(name))),
            "share_asked_mean": _plain(asked / all_asked if all_asked else math.nan),
            "share_realised": _plain(read / total if total else math.nan),
            "tokens": int(read),
            "epochs": _plain(read / usable if usable else math.nan),
            "loss": _plain(self._last_loss(name)),
            "loss_mean": _plain(self._recent_loss(name)),
            "heldout_first": _plain(_score(self._first, name)),
            "heldout_last": _plain(_score(self._last, name)),
            "grad_norm2": _plain(self._signal("grad_norm2", at)),
            "grad_noise": _plain(self._signal("grad_noise", at)),
        }

    def _last_loss(self, name: str) -> float:
        return number(_mapping(self._newest, "domain_loss").get(name))

    def _recent_loss(self, name: str) -> float:
        losses = self._domain_losses.get(name)
        return math.nan if losses is None else losses.mean()

    def _signal(self, kind: str, at: int) -> float:
        values = self._stats.get(kind)
        return number(values[at]) if isinstance(values, list) and at < len(values) else math.nan


def _objects(lines: Iterable[bytes]) -> Iterator[Document]:
    """Yield the objects of JSON lines; damaged ones are left out."""
    for raw in lines:
        # A damaged line must not end the view of a run that goes on.
        with suppress(ValueError):
            line = parse_json(raw)
            if isinstance(line, dict):
                yield line


def _mapping(line: Document, key: str) -> dict[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def _tokens(line: Document) -> float:
    return number(line.get("tokens_per_s")) * number(line.get("seconds"))


def _score(table: dict[str, Any], name: str) -> float:
    row = table.get(name)
    return number(row.get("loss")) if isinstance(row, dict) else math.nan


def _plain(value: float) -> float | None:
    # JSON has no NaN and no infinity; six digits are what metrics are recorded with.
    return float(f"{value:.6g}") if math.isfinite(value) else None
