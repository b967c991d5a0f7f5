"""Ray Tune driver: one trial is one run.

Tune places the runs on the machine or cluster, limits how many run at once, and restarts a run
whose process died. It stores no state of ours: run directories hold it, so a group is resumed by
the same command.
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
# Memory that the driver process of a run with workers reserves.
_DRIVER_BYTES = 2**28
# Tune's own trial records repeat the metrics of the runs; the directory is removed at the end.
_SCRATCH = ".tune"
# Files by which trials are asked to stop with a checkpoint, and then Tune to end.
_STOP, _END = ".stop", ".end"
# Tune would log results as CSV, JSON and TensorBoard; the metrics of each run replace them.
_ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


@dataclass(slots=True)
class Outcome:
    """States and problems of the runs, by name; a run that never started is in neither."""

    states: dict[str, str] = field(default_factory=dict)
    """`running`, `done`, `failed`, `stopped`, or `cut` by the scheduler."""
    problems: dict[str, str] = field(default_factory=dict)
    """Reasons of the failed runs."""


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """Trials of one Tune experiment, in order, with its searcher and scheduler."""

    progress_sources: Mapping[str, tuple[Path, int]]
    """Metrics file and number of steps of each run, by name, in the order of the runs."""
    make: Callable[[Mapping[str, Any]], TrialTask]
    """Builds a task from its Tune config: its index `at` in the order, and the searcher's fields.
    Called in the process of the trial, so it must pickle."""
    searcher: Searcher | None = None
    """Proposes the config of each trial; None: all are known beforehand."""
    scheduler: TrialScheduler | None = None
    """Stops runs early by their reported `objective`."""
    objective: Mapping[str, float] | None = None
    """Loss weights of the objective; None: only the outcome is reported."""


def run_trials(
    trials: Sequence[TrialTask],
    *,
    out: Path,
    trial_resources: TrialResources,
    cluster: ClusterConfig,
    done: int,
) -> Outcome:
    """Run tasks that are known beforehand; arguments and result as `run_trial_plan`."""
    trial_plan = TrialPlan(progress_sources_of(trials), partial(trial_at, trials=tuple(trials)))
    return run_trial_plan(
        trial_plan, out=out, trial_resources=trial_resources, cluster=cluster, done=done
    )


def progress_sources_of(trials: Sequence[TrialTask]) -> dict[str, tuple[Path, int]]:
    """Return metrics file and number of steps of each task, by name."""
    return {trial.name: (trial.metrics, trial.steps) for trial in trials}


def trial_at(config: Mapping[str, Any], *, trials: Sequence[TrialTask]) -> TrialTask:
    """Return the task at index `config["at"]`; module-level, so that a `partial` of it pickles."""
    return trials[config["at"]]


def run_trial_plan(
    trial_plan: TrialPlan,
    *,
    out: Path,
    trial_resources: TrialResources,
    cluster: ClusterConfig,
    done: int,
) -> Outcome:
    """Run the trials, show their progress, and return how they ended.

    Args:
        trial_plan: The trials.
        out: Directory of the group, on a file system that all nodes see.
        trial_resources: Concurrent trials, and the resources of each.
        cluster: The Ray cluster, and restarts per trial.
        done: Runs that were finished before, for the progress.

    Raises:
        ClusterError: If no cluster answers at the address.
        KeyboardInterrupt: After Ctrl-C; running trials have written checkpoints.
    """
    # Files, because trials may be on other nodes; left over from a killed call, they would stop us.
    stop_file, end_file = out / _STOP, out / _END
    for request in (stop_file, end_file):
        request.unlink(missing_ok=True)
    # Before Tune is built: it reads them then. A value the user has set stays.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    callback = _TrialCallback(list(trial_plan.progress_sources))
    try:
        with (
            redirect_ray_output(out / "ray.log"),
            TrialsProgress(trial_plan.progress_sources, done=done) as progress,
            ray_cluster(cluster),
        ):
            tuner = _tuner(trial_plan, out, trial_resources, cluster, callback, end_file)
            _watch(tuner.fit, callback, progress, (stop_file, end_file))
        # Not in `finally`: after an interrupt it stays, and ends what Tune still starts on a
        # cluster that outlives this process.
        stop_file.unlink(missing_ok=True)
    finally:
        end_file.unlink(missing_ok=True)
        shutil.rmtree(out / _SCRATCH, ignore_errors=True)
    return callback.outcome


def _tuner(
    trial_plan: TrialPlan,
    out: Path,
    trial_resources: TrialResources,
    cluster: ClusterConfig,
    callback: _TrialCallback,
    end_file: Path,
) -> tune.Tuner:
    # Through the object store: a list of jobs in every trial's config would be written per trial.
    trainable = tune.with_parameters(
        _trainable, make=trial_plan.make, stop=str(out / _STOP), objective=trial_plan.objective
    )
    # Tune runs a grid in order, so runs start in the order of the plan.
    indices = {"at": tune.grid_search(list(range(len(trial_plan.progress_sources))))}
    return tune.Tuner(
        tune.with_resources(trainable, _reserved(trial_resources)),
        param_space=indices if trial_plan.searcher is None else {},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=trial_resources.parallel,
            # A new process per trial would import torch again, which takes seconds.
            reuse_actors=True,
            search_alg=trial_plan.searcher,
            scheduler=trial_plan.scheduler,
            num_samples=1 if trial_plan.searcher is None else len(trial_plan.progress_sources),
        ),
        run_config=tune.RunConfig(
            name=_SCRATCH,
            storage_path=str(out),
            callbacks=[callback],
            stop=_StopAllTrials(str(end_file)),
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            verbose=0,
        ),
    )


def _reserved(trial_resources: TrialResources) -> dict[str, float]:
    """Return the resources that Tune reserves per trial; workers reserve theirs themselves."""
    if trial_resources.workers:
        # Tune needs a request that is not empty; a CPU here could be one that the workers need.
        return {"memory": _DRIVER_BYTES}
    return {
        "cpu": trial_resources.cpus,
        **({"gpu": trial_resources.gpus} if trial_resources.gpus else {}),
    }


class _StopAllTrials(tune.Stopper):
    """Ends Tune when a file appears; without it, Tune would start every waiting trial."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: single runs are stopped by their tasks."""
        return False

    def stop_all(self) -> bool:
        """Return whether all trials are to end."""
        return self._path.exists()


def _watch(
    fit: Callable[[], object],
    callback: _TrialCallback,
    progress: TrialsProgress,
    request_files: tuple[Path, Path],
) -> None:
    """Show progress until `fit` has ended; Ctrl-C ends the running trials with a checkpoint.

    Args:
        fit: Runs the trials.
        callback: Holds their states.
        progress: Shows them.
        request_files: Files that ask trials to stop, and then Tune to end.
    """
    stop_file, end_file = request_files
    with count_interrupts() as interrupts:
        # Tune installs its own SIGINT handler in the main thread only; in a thread, ours stays.
        work = BackgroundWork(fit)
        interrupted: set[str] | None = None
        while not work.wait(_POLL_S):
            # A copy: the thread of Tune changes the dict meanwhile.
            progress.update(callback.outcome.states.copy(), callback.outcome.problems)
            check_private_cluster()
            if interrupts() and interrupted is None:
                interrupted = callback.running()
                stop_file.touch()
                progress.say("Stopping with checkpoints; Ctrl-C again stops at once.")
            if interrupted is not None and not interrupted & callback.running():
                # Only now: Tune kills trials that still write their checkpoints. And not never:
                # a Tune that outlived our Ray cluster would start another cluster.
                end_file.touch()
            if interrupts() > 1:
                raise KeyboardInterrupt
        progress.update(callback.outcome.states.copy(), callback.outcome.problems)
        if interrupts():
            progress.say("Stopped; the same command goes on from there.")
            raise KeyboardInterrupt
    work.end()


class _TrialCallback(tune.Callback):
    """Records the states of Tune's trials; called in the thread of `fit`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.outcome = Outcome()
        self._names = names

    def running(self) -> set[str]:
        """Return the names of the running trials."""
        return {name for name, state in self.outcome.states.copy().items() if state == "running"}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial has started."""
        self.outcome.states[self._name(trial)] = "running"

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the outcome that a trial reported."""
        result: Mapping[str, Any] = trial.last_result or {}
        # A trial that the scheduler stopped has reported objectives, but no state.
        default = "cut" if "objective" in result else "failed"
        problem = result.get("problem") or "no reason was reported"
        self._end(trial, result.get("state", default), problem)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial's process died more often than `max_failures` allows."""
        lines = str(trial.get_error() or "").strip().splitlines() or [""]
        self._end(trial, "failed", f"its process died: {lines[0][:300]}")

    def _end(self, trial: Any, state: str, problem: str) -> None:
        name = self._name(trial)
        if state == "failed":
            self.outcome.problems[name] = problem
        self.outcome.states[name] = state

    def _name(self, trial: Any) -> str:
        return self._names[trial.config["at"]]


def _trainable(
    config: Mapping[str, Any],
    *,
    make: Callable[[Mapping[str, Any]], TrialTask],
    stop: str,
    objective: Mapping[str, float] | None,
) -> None:
    """Do the work of one trial; the last report holds its outcome."""
    trial, stop_file = make(config), Path(stop)
    if objective is None:
        tune.report(trial.attempt(stop_requested=stop_file.exists))
        return
    reports = _TrialReports(trial.metrics, objective)

    def stop_requested() -> bool:
        # Training polls this anyway, so losses are reported without a thread of their own.
        reports.report()
        return stop_file.exists()

    reports.report(**trial.attempt(stop_requested=stop_requested))


class _TrialReports:
    """Reports the losses in a run's metrics file to Tune, for its scheduler."""

    def __init__(self, metrics: Path, weights: Mapping[str, float]) -> None:
        self._tail = MetricsTail(metrics)
        self._weights = weights
        self._last: dict[str, Any] = {}

    def report(self, **outcome: str) -> None:
        """Report new evaluations; with an outcome, repeat the last one with the outcome added."""
        for line in self._tail.read()[0]:
            if "eval" in line and line["step"] > 0:
                losses = {name: row["loss"] for name, row in line["eval"].items()}
                value = sum(weight * losses[name] for name, weight in self._weights.items())
                self._last = {"step": line["step"], "objective": value}
                # With an outcome, one last report: after it a scheduler could cut a finished run.
                if not outcome:
                    # If the scheduler cuts the run, this call ends the thread by SystemExit.
                    tune.report(self._last)
        if outcome:
            tune.report({**self._last, **outcome})
