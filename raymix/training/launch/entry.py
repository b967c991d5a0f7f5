"""The parts of a run that Ray Train's controller loads: the workers' function and its error policy.

The controller is a process of its own that unpickles both, and trains nothing. So this module
imports neither the training loop nor transformers, which take seconds to load.
"""

from __future__ import annotations

import traceback
from typing import Any

import ray
from ray.train import UserCallback

from raymix.errors import RaymixError, TrainingError
from raymix.training.run.rundir import RunDirectory, read_metrics


def train_worker(config: dict[str, Any]) -> None:
    """Run one rank's loop; `config["job"]` is the reference of a `raymix.training.setup.Job`.

    Raises:
        RaymixError: If the job cannot be done.
    """
    from raymix.training.launch.worker import run_worker

    # A reference, because the controller unpickles the configuration.
    run_worker(ray.get(config["job"]))


class FailFastPolicy(UserCallback):
    """Ends a run at once if restarting the workers cannot help.

    Ray Train restarts the worker group after any exception, `cluster.max_failures` times. That is
    right for a lost machine or a store that does not answer, but not for an error that the user
    must fix, nor for one that recurs at the same step. An exception in a callback ends the run, and
    reaches the driver.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Measure progress by the run's metrics."""
        self._run = run
        self._previous: tuple[int, str] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise if another attempt would fail in the same way.

        Raises:
            RaymixError: The one of a worker, or one that says that the same error recurred.
        """
        known = [each for each in worker_exceptions.values() if isinstance(each, RaymixError)]
        for error in known:
            if not error.transient:
                raise error
        if known:
            # It may well recur at the same step, where the store is away for some minutes.
            return
        first = next(iter(worker_exceptions.values()))
        # The callback runs in Ray Train's controller, maybe on another machine than rank 0.
        if self._run.url is not None:
            self._run.mirror().fetch(self._run.metrics.name)
        step = max((line["step"] for line in read_metrics(self._run.metrics)), default=0)
        # Only the beginning is compared: tracebacks differ in process ids and addresses.
        failure = (step, f"{type(first).__name__}: {first}"[:500])
        if failure == self._previous:
            message = "".join(traceback.format_exception_only(first)).strip().splitlines()[-1]
            raise TrainingError.at(
                "step", step, f"the workers failed twice in the same way: {message}"
            )
        self._previous = failure
