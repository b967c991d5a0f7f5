"""Runs side by side through Ray Tune: one trial is one run.

Tune seats the runs on the machine or cluster, keeps to the number at once, and starts a run again
whose process died. It keeps no state of ours: a run's directory says how far it has come, so a
comparison is resumed by its own command.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raymix.recipe import ClusterConfig
from raymix.training.launch.cluster import check_private_cluster, ray_cluster, redirect_ray_output
from raymix.training.launch.watch import BackgroundWork, count_interrupts
from raymix.training.run.progress import MetricsTail
from raymix.tuning.runs.planning import TrialResources
from raymix.tuning.runs.progress import TrialsProgress
from raymix.tuning.runs.trial_task import TrialTask

_POLL_S = 0.25
_DRIVER_BYTES = 2**28
# Tune's own records of trials, which are no use to anybody here, are removed at the end.
_SCRATCH = ".tune"
# Tune would write its results in three formats; ours are in each run's metrics.
_ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


@dataclass(slots=True)
class Outcome:
    """How the runs ended, by name; a run that never started is in neither."""

    states: dict[str, str] = field(default_factory=dict)
    """`running`, `done`, `failed`, `stopped`, or `cut` by the scheduler."""
    problems: dict[str, str] = field(default_factory=dict)
    """What went wrong with the failed ones."""


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """What Tune is to run, and in what order."""

    watched: Mapping[str, tuple[Path, int]]
    """By name of a run, in their order: its metrics, and its steps."""
    make: Callable[[Mapping[str, Any]], TrialTask]
    """Returns a run from what Tune configures it with: its place `at` in the order, and what else
    the searcher says. Called in the run's own process, so it must pickle."""
    searcher: Searcher | None = None
    """Says what each run is; left out, all are known beforehand."""
    scheduler: TrialScheduler | None = None
    """Stops runs early by the `objective` they report."""
    objective: Mapping[str, float] | None = None
    """Weights of the losses in it; left out, nothing is reported but the end."""


def run_trials(
    trials: Sequence[TrialTask],
    *,
    out: Path,
    seats: TrialResources,
    cluster: ClusterConfig,
    done: int,
) -> Outcome:
    """Return how pieces that are known beforehand ended; the arguments are `run_trial_plan`'s."""
    course = TrialPlan(watched_of(trials), partial(listed, trials=tuple(trials)))
    return run_trial_plan(course, out=out, seats=seats, cluster=cluster, done=done)


def watched_of(trials: Sequence[TrialTask]) -> dict[str, tuple[Path, int]]:
    """Return what is watched of each piece: its metrics, and its steps."""
    return {trial.name: (trial.metrics, trial.steps) for trial in trials}


def listed(config: Mapping[str, Any], *, trials: Sequence[TrialTask]) -> TrialTask:
    """Return the run at a place of a list."""
    return trials[config["at"]]


def run_trial_plan(
    course: TrialPlan, *, out: Path, seats: TrialResources, cluster: ClusterConfig, done: int
) -> Outcome:
    """Return how the runs ended, having shown their progress.

    Args:
        course: The runs.
        out: Directory of all of them, on a file system that all nodes see.
        seats: How many at once, and what each gets.
        cluster: Where to run.
        done: Runs that were finished before, for the progress.

    Raises:
        ClusterError: If no cluster answers at the address.
        KeyboardInterrupt: After Ctrl-C; runs that were going on have written checkpoints.
    """
    stop, end = out / ".stop", out / ".end"
    for request in (stop, end):
        request.unlink(missing_ok=True)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    board = _TrialBoard(list(course.watched))
    try:
        with (
            redirect_ray_output(out / "ray.log"),
            TrialsProgress(course.watched, done=done) as progress,
            ray_cluster(cluster),
        ):
            tuner = _tuner(course, out, seats, cluster, board, (stop, end))
            _watch(tuner.fit, board, progress, (stop, end))
        # After an interrupt it stays: what Tune still starts on a Ray that goes on ends by it.
        stop.unlink(missing_ok=True)
    finally:
        end.unlink(missing_ok=True)
        shutil.rmtree(out / _SCRATCH, ignore_errors=True)
    return board.outcome


def _tuner(
    course: TrialPlan,
    out: Path,
    seats: TrialResources,
    cluster: ClusterConfig,
    board: _TrialBoard,
    requests: tuple[Path, Path],
) -> tune.Tuner:
    stop, end = requests
    work = tune.with_parameters(
        _trial, make=course.make, stop=str(stop), objective=course.objective
    )
    known = {"at": tune.grid_search(list(range(len(course.watched))))}
    return tune.Tuner(
        tune.with_resources(work, _needs(seats)),
        param_space=known if course.searcher is None else {},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=seats.parallel,
            reuse_actors=True,
            search_alg=course.searcher,
            scheduler=course.scheduler,
            num_samples=1 if course.searcher is None else len(course.watched),
        ),
        run_config=tune.RunConfig(
            name=_SCRATCH,
            storage_path=str(out),
            callbacks=[board],
            stop=_StopAllTrials(str(end)),
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            verbose=0,
        ),
    )


def _needs(seats: TrialResources) -> dict[str, float]:
    """Return what Tune reserves for a trial; workers reserve what they need themselves."""
    if seats.workers:
        # Tune wants something reserved, and every CPU may be a worker's.
        return {"memory": _DRIVER_BYTES}
    return {"cpu": seats.cpus, **({"gpu": seats.gpus} if seats.gpus else {})}


class _StopAllTrials(tune.Stopper):
    """Ends Tune when a file appears: left to itself, it would begin every run that is waiting."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return that no single run is to be stopped."""
        return False

    def stop_all(self) -> bool:
        """Return whether all are."""
        return self._path.exists()


def _watch(
    fit: Callable[[], object],
    board: _TrialBoard,
    progress: TrialsProgress,
    requests: tuple[Path, Path],
) -> None:
    """Show progress until `fit` has ended; Ctrl-C ends the running runs with a checkpoint.

    Args:
        fit: Makes the runs.
        board: Knows how they are.
        progress: Shows it.
        requests: The files that ask runs to stop, and then Tune to end.
    """
    stop, end = requests
    with count_interrupts() as pressed:
        work = BackgroundWork(fit)
        waited_for: set[str] | None = None
        while not work.wait(_POLL_S):
            progress.update(board.outcome.states.copy(), board.outcome.problems)
            check_private_cluster()
            if pressed() and waited_for is None:
                waited_for = board.running()
                stop.touch()
                progress.say("Stopping with checkpoints; Ctrl-C again stops at once.")
            if waited_for is not None and not waited_for & board.running():
                end.touch()  # a Tune that outlived our Ray would start another
            if pressed() > 1:
                raise KeyboardInterrupt
        progress.update(board.outcome.states.copy(), board.outcome.problems)
        if pressed():
            progress.say("Stopped; the same command goes on from there.")
            raise KeyboardInterrupt
    work.end()


class _TrialBoard(tune.Callback):
    """Notes what Tune says of its trials."""

    def __init__(self, names: Sequence[str]) -> None:
        self.outcome = Outcome()
        self._names = names

    def running(self) -> set[str]:
        """Return the runs that are going on."""
        return {name for name, state in self.outcome.states.copy().items() if state == "running"}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a run has started."""
        self.outcome.states[self._name(trial)] = "running"

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note how a run ended, by its own account."""
        told: Mapping[str, Any] = trial.last_result or {}
        # A run that the scheduler stopped has said no more than how far it had come.
        unsaid = "cut" if "objective" in told else "failed"
        self._end(trial, told.get("state", unsaid), told.get("problem") or "it said nothing")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a run's process died for good."""
        said = str(trial.get_error() or "").strip().splitlines() or [""]
        self._end(trial, "failed", f"its process died: {said[0][:300]}")

    def _end(self, trial: Any, state: str, problem: str) -> None:
        name = self._name(trial)
        if state == "failed":
            self.outcome.problems[name] = problem
        self.outcome.states[name] = state

    def _name(self, trial: Any) -> str:
        return self._names[trial.config["at"]]


def _trial(
    config: Mapping[str, Any],
    *,
    make: Callable[[Mapping[str, Any]], TrialTask],
    stop: str,
    objective: Mapping[str, float] | None,
) -> None:
    """Make one run; the last thing reported says how it ended."""
    trial, stop_file = make(config), Path(stop)
    if objective is None:
        tune.report(trial.attempt(stop_requested=stop_file.exists))
        return
    losses = _TrialReports(trial.metrics, objective)

    def stop_requested() -> bool:
        losses.report()
        return stop_file.exists()

    end = trial.attempt(stop_requested=stop_requested)
    losses.report(**end)


class _TrialReports:
    """Reports a run's losses to Tune as they come."""

    def __init__(self, metrics: Path, weights: Mapping[str, float]) -> None:
        self._tail = MetricsTail(metrics)
        self._weights = weights
        self._last: dict[str, Any] = {}

    def report(self, **end: str) -> None:
        """Report the evaluations that are new; with `end`, once more with how the run ended."""
        for line in self._tail.read()[0]:
            if "eval" in line and line["step"] > 0:
                losses = {name: row["loss"] for name, row in line["eval"].items()}
                value = sum(weight * losses[name] for name, weight in self._weights.items())
                self._last = {"step": line["step"], "objective": value}
                if not end:
                    # The scheduler may end the process's thread in here.
                    tune.report(self._last)
        if end:
            tune.report({**self._last, **end})
