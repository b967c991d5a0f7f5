"""Steps that take far longer than usual: found on each rank, told to the user by the driver.

A rank that waits for data, a disk or another rank raises nothing, and all others wait with it. So a
thread of each rank looks at the training thread once a second. Where a step takes too long, it
writes a report, from which the driver says which rank does something else than the others.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from raymix._utils.json import parse_json

# A step is late after this many usual ones.
_LATE = 20
# The first step compiles and fills caches; an evaluation and a checkpoint take longer than a step.
_LONGER = 10
_USUAL_STEPS = 50
_LOOP = "raymix.training.loop"
# Functions of the training loop, the innermost first, and what a rank does in them.
_ACTIVITIES = {
    "_save_checkpoint": "writing a checkpoint",
    "_evaluate": "scoring held-out text",
    "_gradient_statistics": "measuring gradients",
    "_drain_metrics": "waiting for the sums of all ranks",
    "_train_step": "in its forward and backward passes",
    "_next_step": "reading a batch",
}
_OUTSIDE = "outside of a step"
_STEP_ACTIVITIES = frozenset(list(_ACTIVITIES.values())[3:])
# Reports of the other ranks come within this time after the first.
_GATHER_S = 3.0


@dataclass(frozen=True, slots=True)
class StallReport:
    """One rank in a step that takes too long."""

    rank: int
    host: str
    step: int
    """The step, from 1."""
    activity: str
    """What the rank does."""
    seconds: float
    """Time in this activity so far."""
    usual_s: float | None
    """Median time of a step; None before the second step."""
    stack: list[str]
    """Python's stack of the training thread, the innermost call last."""


@contextmanager
def report_stalls(
    directory: Path, *, rank: int, step: Callable[[], int], seconds: float, poll_s: float = 1.0
) -> Iterator[None]:
    """Watch this thread, which trains, and write a report where a step takes too long.

    Args:
        directory: For the reports, one file per rank.
        rank: This rank.
        step: Returns the steps done; called from another thread.
        seconds: Shortest time that is too long; 0 watches nothing.
        poll_s: Time between two looks.
    """
    if not seconds:
        yield
        return
    ended = threading.Event()
    watched = threading.get_ident()

    def watch() -> None:
        watcher = _Watcher(directory, rank, seconds, step())
        while not ended.wait(poll_s):
            frame = sys._current_frames().get(watched)
            if frame is not None:
                watcher.look(step(), frame)

    # A daemon: it must not keep a process that is ending.
    thread = threading.Thread(target=watch, name="raymix-stalls", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Watcher:
    """Times steps and activities as they are seen."""

    def __init__(self, directory: Path, rank: int, seconds: float, step: int) -> None:
        self._path = directory / f"rank-{rank:05d}.json"
        self._rank = rank
        self._seconds = seconds
        self._step = step
        self._step_began_s = self._activity_began_s = time.monotonic()
        self._activity = ""
        self._step_s: deque[float] = deque(maxlen=_USUAL_STEPS)
        self._reported = False

    def look(self, step: int, frame: FrameType) -> None:
        """Note what the thread does, and report it once if it has done so for too long."""
        now = time.monotonic()
        activity = _activity(frame)
        if step != self._step:
            # Several steps may lie between two looks.
            self._step_s.append((now - self._step_began_s) / (step - self._step))
            self._step, self._step_began_s = step, now
        elif activity == self._activity:
            if not self._reported and now - self._activity_began_s > self._limit_s(activity):
                self._reported = True
                self._write(activity, now - self._activity_began_s, frame)
            return
        self._activity, self._activity_began_s, self._reported = activity, now, False

    def _limit_s(self, activity: str) -> float:
        usual_s = statistics.median(self._step_s) if self._step_s else None
        longer = 1 if activity in _STEP_ACTIVITIES and usual_s is not None else _LONGER
        return longer * max(self._seconds, _LATE * (usual_s or 0.0))

    def _write(self, activity: str, seconds: float, frame: FrameType) -> None:
        usual_s = statistics.median(self._step_s) if self._step_s else None
        stack = [line.rstrip() for line in traceback.format_stack(frame)]
        report = StallReport(
            self._rank, socket.gethostname(), self._step + 1, activity, seconds, usual_s, stack
        )
        # A report that cannot be written must not end the run.
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            draft = self._path.with_suffix(".new")
            draft.write_text(json.dumps(asdict(report), indent=1), "utf-8")
            draft.replace(self._path)


def _activity(frame: FrameType | None) -> str:
    while frame is not None:
        name = frame.f_code.co_name
        if name in _ACTIVITIES and frame.f_globals.get("__name__") == _LOOP:
            return _ACTIVITIES[name]
        frame = frame.f_back
    return _OUTSIDE


class StallReports:
    """The reports of all ranks, as they come.

    Args of the constructor:
        directory: Where the ranks write them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._told = 0
        self._first_s: float | None = None

    def poll(self, last_step: int) -> str | None:
        """Return a line on a step that takes too long, once for each.

        Args:
            last_step: The last step done: reports of earlier ones are no news.
        """
        if not self._directory.is_dir():
            return None
        reports = [each for each in self._read() if each.step > max(self._told, last_step)]
        if not reports:
            self._first_s = None
            return None
        if self._first_s is None:
            self._first_s = time.monotonic()
        if time.monotonic() - self._first_s < _GATHER_S:
            return None
        self._told, self._first_s = max(each.step for each in reports), None
        return describe(reports, self._directory)

    def _read(self) -> list[StallReport]:
        reports = []
        for path in sorted(self._directory.glob("rank-*.json")):
            # Written by a version that differs, or removed meanwhile.
            with suppress(OSError, ValueError, TypeError):
                reports.append(StallReport(**parse_json(path.read_bytes())))
        return reports


def describe(reports: list[StallReport], directory: Path) -> str:
    """Return the line on a step that takes too long."""
    step = max(each.step for each in reports)
    late = [each for each in reports if each.step == step]
    usual_s = late[0].usual_s
    line = f"step {step:,} has taken {max(each.seconds for each in late):.0f} s"
    line += f", where {usual_s:.3g} s are usual" if usual_s is not None else ""
    ranks_by_activity: dict[str, list[StallReport]] = {}
    for each in late:
        ranks_by_activity.setdefault(each.activity, []).append(each)
    # The few ranks that do something else than the others are those that these wait for.
    groups = sorted(ranks_by_activity.items(), key=lambda group: len(group[1]))
    said = []
    for activity, ranks in groups:
        few = ", ".join(f"{each.rank} ({each.host})" for each in ranks[:4])
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        said.append(f"rank{'s' * (len(ranks) > 1)} {few}{more} {activity}")
    return f"{line}: {'; '.join(said)}. Stacks: {directory}"
