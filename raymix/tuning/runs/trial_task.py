"""One run inside its trial: trained in the trial's process, or by workers that Ray Train places."""

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
from raymix.training.launch.cluster import ray_cluster
from raymix.training.launch.local import run_in_process
from raymix.training.launch.watch import BackgroundWork
from raymix.training.run.checkpoint import newest_checkpoint
from raymix.training.setup import Job
from raymix.tuning.runs.planning import ERROR_LOG

_POLL_S = 0.2


class TrialTask(Protocol):
    """What one trial of Tune brings to its end."""

    @property
    def name(self) -> str:
        """Return what it is called, on the screen and on disk."""
        ...

    @property
    def metrics(self) -> Path:
        """Return the file of what it says on the way."""
        ...

    @property
    def steps(self) -> int:
        """Return how many steps it has, as its metrics count them."""
        ...

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Return how it ended: its `state` and its `problem`; whatever goes wrong is told."""
        ...


@dataclass(frozen=True, slots=True)
class RunTrial:
    """A run to be made or brought to its end."""

    name: str
    job: Job
    parameters: int
    """Of the model, for the record."""

    @property
    def metrics(self) -> Path:
        """Return the metrics of the run."""
        return self.job.run.metrics

    @property
    def steps(self) -> int:
        """Return the steps of the run."""
        return self.job.steps

    def attempt(self, *, stop_requested: Callable[[], bool]) -> dict[str, str]:
        """Return how the run ended, having trained it."""
        if stop_requested():
            return {"state": "stopped"}
        with trial_outcome(self.job.run.path) as end, self.job.run.locked():
            stopped = _train(self, _now_and_then(stop_requested))
            end["state"] = "stopped" if stopped else "done"
        return end


@contextmanager
def trial_outcome(folder: Path) -> Iterator[dict[str, str]]:
    """Yield a piece's end, to be filled in; an error inside is told there: the others go on.

    Args:
        folder: Where the traceback of an error that is not one of input goes.
    """
    end = {"state": "failed", "problem": "it said nothing"}
    try:
        yield end
        end.pop("problem")
    except RaymixError as error:
        end |= {"state": "failed", "problem": str(error)}
    except Exception as error:  # noqa: BLE001 - the report is the only way out of this process
        folder.mkdir(parents=True, exist_ok=True)
        where = folder / ERROR_LOG
        where.write_text(traceback.format_exc(), encoding="utf-8")
        said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        end |= {"state": "failed", "problem": f"{said[:300]} (all of it: {where})"}


def _train(trial: RunTrial, stop_requested: Callable[[], bool]) -> bool:
    """Return whether the run was stopped before its end."""
    job, workers = trial.job, trial.job.recipe.cluster.workers
    job.run.write_recipe(job.recipe)
    about = environment(steps=job.steps, parameters=trial.parameters, workers=workers)
    atomic_write_text(str(job.run.path / "environment.json"), json.dumps(about, indent=1))
    if not workers:
        return run_in_process(job, stop_requested=stop_requested).stopped
    from raymix.training.launch.driver import run_on_ray

    # Names of actors hold the session, and other runs of the group go on beside this one.
    job = replace(job, session=uuid.uuid4().hex[:12])
    job.run.stop_request.unlink(missing_ok=True)
    with ray_cluster(job.recipe.cluster):
        run_on_ray(job, lambda work: _stoppable(work, job, stop_requested))
    found = newest_checkpoint(job.run.checkpoints)
    return found is None or found[1].step < job.steps


def _stoppable(work: Callable[[], object], job: Job, stop_requested: Callable[[], bool]) -> None:
    """Do `work` in a thread; when a stop is asked for, have the workers end with a checkpoint."""
    training = BackgroundWork(work)
    try:
        while not training.wait(_POLL_S) and not stop_requested():
            pass
    finally:
        # Tune ends a run that its scheduler cut inside `stop_requested`, by an exception.
        if not training.wait(0):
            job.run.stop_request.touch()
        training.end()


def _now_and_then(stop_requested: Callable[[], bool]) -> Callable[[], bool]:
    """Return `stop_requested`, looked at a few times a second: the file may be on a shared disk."""
    due, last = 0.0, False

    def asked() -> bool:
        nonlocal due, last
        if time.monotonic() >= due:
            due, last = time.monotonic() + _POLL_S, stop_requested()
        return last

    return asked
