"""Searches of merges as Ray Tune runs them: one point each, or one whole search after another.

`raymix merge --search` has merges that may be large, so each point is a trial of its own and a
round runs as wide as the machine. `raymix specialists` has many searches over small models, so each
search is a trial. Both leave the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix.errors import MergeError
from raymix.merging.search_space import Point, next_points, start_point
from raymix.store import atomic_write_text
from raymix.tuning.merges.scoring import Search, best_of, tried
from raymix.tuning.runs.trial_task import trial_outcome

RESULT = "result.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class PointTrial:
    """One point of a search."""

    search: Search
    number: int
    point: Point
    threads: int

    @property
    def name(self) -> str:
        """Return its options and their values."""
        values = ",".join(f"{name}={value:g}" for name, value in self.point.items())
        return f"{self.number:03d} {values}"

    @property
    def metrics(self) -> Path:
        """Return a file that is never there: a point says nothing before its end."""
        return self.search.folder / f"{self.number:03d}.jsonl"

    @property
    def steps(self) -> int:
        """Return 1."""
        return 1

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Return how it ended, having tried the point."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.search.folder) as end:
            self.search.record(self.number, self.point, threads=self.threads)
            end["state"] = "done"
        return end


@dataclass(frozen=True, slots=True)
class SearchTrial:
    """A whole search: its points, then the file's own merge and the best one on the test rows."""

    name: str
    search: Search
    threads: int

    @property
    def metrics(self) -> Path:
        """Return the file with a line for each point."""
        return self.search.folder / METRICS

    @property
    def steps(self) -> int:
        """Return how many points there are."""
        return self.search.trials

    def result(self) -> dict[str, Any] | None:
        """Return what it came to; None where it has not ended, or was another search."""
        path = self.search.folder / RESULT
        if not path.is_file() or not self.search.open():
            return None
        return json.loads(path.read_text("utf-8"))

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Return how it ended, having tried the points that were not tried."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.search.folder) as end:
            end["state"] = "done" if self._work(stop_requested) else "stopped"
        return end

    def _work(self, stop_requested: Callable[[], bool]) -> bool:
        """Return whether it came to its end."""
        search = self.search
        if not search.open():
            search.restart()
        points = search.points()
        while round_ := _round(search, points):
            for number, point in round_:
                if stop_requested():
                    return False
                points.append(search.record(number, point, threads=self.threads))
                self._say(points)
        best = best_of(points)["options"]
        given = start_point(search.space)
        scored = {"given": given, "best": best} if best != given else {"given": given}
        test = {
            name: search.score(point, "test", threads=self.threads)
            for name, point in scored.items()
        }
        document = {"points": points, "best": best, "test": {"best": test["given"], **test}}
        text = json.dumps(document, ensure_ascii=False, indent=1)
        atomic_write_text(str(search.folder / RESULT), text + "\n")
        return True

    def _say(self, points: list[dict[str, Any]]) -> None:
        lines = [json.dumps({"step": p["number"] + 1, "loss": p["loss"]}) for p in points]
        atomic_write_text(str(self.metrics), "\n".join(lines) + "\n")


def _round(search: Search, points: list[dict[str, Any]]) -> list[tuple[int, Point]]:
    """Return the points of the round that is going on that were not tried, with their numbers."""
    return [(n, p) for n, p in round_of(search, points) if n >= len(points)]


def round_of(search: Search, points: list[dict[str, Any]]) -> list[tuple[int, Point]]:
    """Return the first round that is not whole: its points, with their numbers.

    Args:
        search: The search.
        points: What was tried so far, from the first point on.
    """
    if not search.space:
        return [(0, {})] if not points else []
    begun = 0
    while True:
        proposed = next_points(search.space, tried(points[:begun]), search.trials)
        if not proposed or begun + len(proposed) > len(points):
            return [(begun + at, point) for at, point in enumerate(proposed)]
        begun += len(proposed)


@dataclass(frozen=True, slots=True)
class ScoreTrial:
    """A model as it is, or the merge at a point, on the test rows of a search."""

    name: str
    search: Search
    threads: int
    checkpoint: str | None = None
    point: Point | None = None

    @property
    def metrics(self) -> Path:
        """Return a file that is never there: scoring says nothing before its end."""
        return self.path.with_suffix(".jsonl")

    @property
    def steps(self) -> int:
        """Return 1."""
        return 1

    @property
    def path(self) -> Path:
        """Return the file of its losses; that of a merge is named by its point."""
        values = "".join(f" {name}={value:g}" for name, value in (self.point or {}).items())
        return self.search.folder / f"test-{self.name}{values}.json"

    def result(self) -> dict[str, float] | None:
        """Return its losses by domain, None where it was not scored yet."""
        return json.loads(self.path.read_text("utf-8")) if self.path.is_file() else None

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Return how it ended, having scored the model."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.search.folder) as end:
            losses: dict[str, float] = {}
            with suppress(MergeError):  # without a loss: its point in the search says why
                losses = self._losses()
            atomic_write_text(str(self.path), json.dumps(losses) + "\n")
            end["state"] = "done"
        return end

    def _losses(self) -> dict[str, float]:
        if self.checkpoint is not None:
            held_out = self.search.held_out
            return held_out.losses(self.checkpoint, "test", threads=self.threads)
        return self.search.score(
            self.point or {}, "test", threads=self.threads, number=self.path.stem
        )
