"""Tasks of merge searches as Ray Tune trials: single points, whole searches, scores of models.

`raymix merge --search` has one search over models that may be large: each point is a trial, and
those of a round run concurrently. `raymix specialists` has many searches over small models: each
search is a trial. Both write the same files.
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
from raymix.tuning.merges.scoring import Search, best_of, evaluated
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
        """Return its number, options and values."""
        values = ",".join(f"{name}={value:g}" for name, value in self.point.items())
        return f"{self.number:03d} {values}"

    @property
    def metrics(self) -> Path:
        """Return the path of a file that is never written: a point has no progress."""
        return self.search.folder / f"{self.number:03d}.jsonl"

    @property
    def steps(self) -> int:
        """Return 1: the task is one step."""
        return 1

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Evaluate the point and return how it ended."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.search.folder) as outcome:
            self.search.record(self.number, self.point, threads=self.threads)
            outcome["state"] = "done"
        return outcome


@dataclass(frozen=True, slots=True)
class SearchTrial:
    """A whole search: its points, then the given and the best merge on the test rows."""

    name: str
    search: Search
    threads: int

    @property
    def metrics(self) -> Path:
        """Return the metrics file, one line per point."""
        return self.search.folder / METRICS

    @property
    def steps(self) -> int:
        """Return the number of points."""
        return self.search.trials

    def result(self) -> dict[str, Any] | None:
        """Return its result; None if it has not ended, or the directory holds another search."""
        path = self.search.folder / RESULT
        # `open` is False for other models: a base trained anew makes the old search invalid.
        if not path.is_file() or not self.search.open():
            return None
        return json.loads(path.read_text("utf-8"))

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Evaluate the missing points and return how the search ended."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.search.folder) as outcome:
            outcome["state"] = "done" if self._evaluate(stop_requested) else "stopped"
        return outcome

    def _evaluate(self, stop_requested: Callable[[], bool]) -> bool:
        """Evaluate all points and the test rows; return False if stopped before the end."""
        search = self.search
        if not search.open():
            # Not refused: its models are outputs of this very command, and follow its recipe.
            search.restart()
        points = search.points()
        while round_ := _remaining_round(search, points):
            for number, point in round_:
                # Between points only: a point in progress would be lost.
                if stop_requested():
                    return False
                points.append(search.record(number, point, threads=self.threads))
                self._write_metrics(points)
        best = best_of(points)["options"]
        given = start_point(search.space)
        scored = {"given": given, "best": best} if best != given else {"given": given}
        # On equal points the merge is scored once, and `best` falls back to `given` below.
        test = {
            name: search.score(point, "test", threads=self.threads)
            for name, point in scored.items()
        }
        document = {"points": points, "best": best, "test": {"best": test["given"], **test}}
        text = json.dumps(document, ensure_ascii=False, indent=1)
        atomic_write_text(str(search.folder / RESULT), text + "\n")
        return True

    def _write_metrics(self, points: list[dict[str, Any]]) -> None:
        # Written whole each time: a resumed search starts with points of an earlier process.
        lines = [json.dumps({"step": p["number"] + 1, "loss": p["loss"]}) for p in points]
        atomic_write_text(str(self.metrics), "\n".join(lines) + "\n")


def _remaining_round(search: Search, points: list[dict[str, Any]]) -> list[tuple[int, Point]]:
    """Return the missing points of the current round, with their numbers."""
    return [(n, p) for n, p in round_of(search, points) if n >= len(points)]


def round_of(search: Search, points: list[dict[str, Any]]) -> list[tuple[int, Point]]:
    """Return the first incomplete round: its points, with their numbers; empty at the end.

    Args:
        search: The search.
        points: Records of the evaluated points, without a gap from the first one on.
    """
    if not search.space:
        # Nothing to search: the merge as given is the one point.
        return [(0, {})] if not points else []
    # Rounds are not stored. Proposals are a pure function of the rounds before, so replaying them
    # from the first one finds where the search stands.
    round_start = 0
    while True:
        proposed = next_points(search.space, evaluated(points[:round_start]), search.trials)
        if not proposed or round_start + len(proposed) > len(points):
            return [(round_start + offset, point) for offset, point in enumerate(proposed)]
        round_start += len(proposed)


@dataclass(frozen=True, slots=True)
class ScoreTrial:
    """Score of a checkpoint, or of the merge at a point, on the test rows of a search."""

    name: str
    search: Search
    threads: int
    checkpoint: str | None = None
    point: Point | None = None

    @property
    def metrics(self) -> Path:
        """Return the path of a file that is never written: scoring has no progress."""
        return self.path.with_suffix(".jsonl")

    @property
    def steps(self) -> int:
        """Return 1: the task is one step."""
        return 1

    @property
    def path(self) -> Path:
        """Return the file of its losses; for a merge, its name contains the point."""
        values = "".join(f" {name}={value:g}" for name, value in (self.point or {}).items())
        return self.search.folder / f"test-{self.name}{values}.json"

    def result(self) -> dict[str, float] | None:
        """Return its losses by domain; None if it was not scored yet."""
        return json.loads(self.path.read_text("utf-8")) if self.path.is_file() else None

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Score the model and return how it ended."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.search.folder) as outcome:
            losses: dict[str, float] = {}
            # No losses then; the reason is in the record of its point.
            with suppress(MergeError):
                losses = self._losses()
            atomic_write_text(str(self.path), json.dumps(losses) + "\n")
            outcome["state"] = "done"
        return outcome

    def _losses(self) -> dict[str, float]:
        if self.checkpoint is not None:
            held_out = self.search.held_out
            return held_out.losses(self.checkpoint, "test", threads=self.threads)
        return self.search.score(
            self.point or {}, "test", threads=self.threads, number=self.path.stem
        )
