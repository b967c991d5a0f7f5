"""One run inside its Tune trial, trained in the trial's process or by Ray Train workers.

An error is part of the result and never leaves `attempt`: Tune would restart the trial, and the
other runs of the group must go on.
"""

from __future__ import annotations

import json
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from raymix.errors import RaymixError
from raymix.store import atomic_write_text
from raymix.training.host.environment import environment
from raymix.training.job import Job
from raymix.training.launch.cluster import ray_cluster
from raymix.training.launch.local import run_in_process
from raymix.training.launch.watch import BackgroundWork
from raymix.training.run.checkpoint import newest_checkpoint
from raymix.tuning.runs.planning import ERROR_LOG

_POLL_S = 0.2
_MAX_PROBLEM_CHARS = 300


class TrialTask(Protocol):
    """Work of one Tune trial: a training run, a point of a search, a whole search."""

    @property
    def name(self) -> str:
        """Return its name, on the console and on disk."""
        ...

    @property
    def metrics(self) -> Path:
        """Return the path of its metrics file; it may never be written."""
        ...

    @property
    def steps(self) -> int:
        """Return its number of steps, in the unit of its metrics."""
        ...

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Do the work and return its `state` and, if it failed, its `problem`; never raises."""
        ...


@dataclass(frozen=True, slots=True)
class RunTrial:
    """A training run to start or to resume."""

    name: str
    job: Job
    parameters: int
    """Parameters of the model, for `environment.json`."""

    @property
    def metrics(self) -> Path:
        """Return the metrics of the run."""
        return self.job.run.metrics

    @property
    def steps(self) -> int:
        """Return the steps of the run."""
        return self.job.steps

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Train the run and return how it ended."""
        if stop_requested():
            return {"state": "stopped"}
        # The outcome is outside the lock: an error of the lock itself is reported as well.
        with trial_outcome(self.job.run.path) as outcome, self.job.run.locked():
            stopped = _train(self, _throttled(stop_requested))
            outcome["state"] = "stopped" if stopped else "done"
        return outcome


@contextmanager
def trial_outcome(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the outcome of a task, to be filled in; an error inside becomes its problem.

    Args:
        folder: Directory of the traceback of an error that is not a RaymixError.
    """
    # Failed until shown otherwise. Tune ends a trial by SystemExit, which is no Exception.
    outcome = {"state": "failed", "problem": "no reason was reported"}
    try:
        yield outcome
        outcome.pop("problem")
    except RaymixError as error:
        outcome |= {"state": "failed", "problem": str(error)}
    except Exception as error:  # noqa: BLE001 - the report is the only way out of this process
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / ERROR_LOG
        log.write_text(traceback.format_exc(), encoding="utf-8")
        # The last line: errors of torch and Ray put their own traceback before the message.
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        problem = f"{summary[:_MAX_PROBLEM_CHARS]} (full traceback: {log})"
        outcome |= {"state": "failed", "problem": problem}


def _train(trial: RunTrial, stop_requested: Callable[[], bool]) -> bool:
    """Train the run; return whether it was stopped before its last step."""
    job, workers = trial.job, trial.job.recipe.cluster.workers
    job.run.write_recipe(job.recipe)
    record = environment(steps=job.steps, parameters=trial.parameters, workers=workers)
    atomic_write_text(str(job.run.path / "environment.json"), json.dumps(record, indent=1))
    if not workers:
        return run_in_process(job, stop_requested=stop_requested).stopped
    # Imported here: runs of one process need neither Ray Train nor its import time.
    from raymix.training.launch.driver import run_on_ray

    # Actor names hold the session, and other runs of the group use the same cluster.
    job = replace(job, session=uuid.uuid4().hex[:12])
    # A request left by a stopped call would stop the resumed run at its first step.
    job.run.stop_request.unlink(missing_ok=True)
    with ray_cluster(job.recipe.cluster):
        run_on_ray(job, lambda work: _run_stoppable(work, job, stop_requested))
    # The driver does not say why the workers ended: the newest checkpoint does.
    newest = newest_checkpoint(job.run.checkpoints)
    return newest is None or newest[1].step < job.steps


def _run_stoppable(
    work: Callable[[], object], job: Job, stop_requested: Callable[[], bool]
) -> None:
    """Do `work` in a thread; after a stop request the workers write a checkpoint and end."""
    training = BackgroundWork(work)
    try:
        while not training.wait(_POLL_S) and not stop_requested():
            pass
    finally:
        # In `finally`: Tune ends a run that its scheduler cut by an exception in `stop_requested`.
        if not training.wait(0):
            job.run.stop_request.touch()
        training.end()


def _throttled(stop_requested: Callable[[], bool]) -> Callable[[], bool]:
    """Return `stop_requested`, evaluated at most five times a second."""
    # Training calls it every step, and the request is a file that may be on a shared disk.
    due, last = 0.0, False

    def poll() -> bool:
        nonlocal due, last
        if time.monotonic() >= due:
            due, last = time.monotonic() + _POLL_S, stop_requested()
        return last

    return poll
