"""Experiment trackers of a run: TensorBoard, Weights & Biases, MLflow, Trackio, classes of yours.

All get the same scalars. A tracker is for eyes: `metrics.jsonl` has everything, so a fault of one,
such as a server that is down, ends that tracker and not the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raymix._utils.imports import importing_from_here
from raymix.errors import RecipeError, format_problem
from raymix.recipe import RunConfig
from raymix.recipe.sections.trackers import TRACKERS

_LOG = logging.getLogger("raymix.trackers")
_PROJECT = "raymix"
_TAG = "raymix.run"
# MLflow's rule for the names of metrics.
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. /:]")


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as its trackers see it."""

    id: str
    """The same at every start of the run, so that a tracker goes on with its record."""
    name: str
    directory: Path
    """The run directory on this machine."""
    start_step: int
    """Optimizer steps done before this start. Later ones may have been sent already: the same."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""


class Tracker(Protocol):
    """A tracker; one of your own takes a `TrackedRun` and its options as keyword arguments."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values after `step` optimizer steps."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class WandbTracker:
    """Weights & Biases; WANDB_MODE=offline keeps its files in the run directory."""

    def __init__(self, run: TrackedRun, **options: Any) -> None:
        """Begin or go on; `options` are further arguments of `wandb.init`."""
        import wandb

        given = {"project": _PROJECT, "name": run.name, "dir": str(run.directory), **options}
        self._run = wandb.init(id=run.id, resume="allow", config=dict(run.recipe), **given)
        # Steps trained again after a crash are behind its own counter, which drops them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowTracker:
    """MLflow: a run of an experiment, found again by its tag."""

    def __init__(
        self, run: TrackedRun, *, tracking_uri: str | None = None, experiment: str = _PROJECT
    ) -> None:
        """Begin or go on, at `tracking_uri` or that of MLFLOW_TRACKING_URI."""
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        earlier = self._client.search_runs([number], filter_string=f"tags.`{_TAG}` = '{run.id}'")
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(
            number, run_name=run.name, tags={_TAG: run.id}
        ).info.run_id
        for name, value in _flat(run.recipe):
            self._client.log_param(self._run, name, value[:500], synchronous=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values."""
        for name, value in values.items():
            # Not waited for: a server's answer takes longer than a small step.
            self._client.log_metric(
                self._run, _NOT_IN_MLFLOW.sub("_", name), value, step=step, synchronous=False
            )

    def close(self) -> None:
        """Send what is left."""
        from mlflow import flush_async_logging

        flush_async_logging()
        self._client.set_terminated(self._run)


class TrackioTracker:
    """Trackio, on this machine or in a Space of the Hub."""

    def __init__(self, run: TrackedRun, **options: Any) -> None:
        """Begin or go on; `options` are further arguments of `trackio.init`."""
        import trackio

        given = {"project": _PROJECT, "embed": False, **options}
        # It knows a run by its name alone.
        name = f"{run.name}-{run.id[:8]}"
        self._run = trackio.init(name=name, resume="allow", config=dict(run.recipe), **given)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


_CLASSES: Mapping[str, Any] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}


class _Guarded:
    """A tracker whose first fault is logged and ends it."""

    def __init__(self, name: str, kind: Any, run: TrackedRun, options: Mapping[str, Any]) -> None:
        self._name = name
        self._tracker: Any = None
        self._path = run.directory / "trackers.log"
        self._do(lambda: setattr(self, "_tracker", kind(run, **options)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            self._do(lambda: self._tracker.scalars(step, values))

    def close(self) -> None:
        if self._tracker is not None:
            self._do(self._tracker.close)

    def _do(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 # of libraries and servers of all kinds
            self._tracker = None
            text = f"{self._name} ends here: {type(error).__name__}: {error}"
            _LOG.warning(text)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def open_trackers(config: RunConfig, run: TrackedRun) -> list[Tracker]:
    """Return the trackers of a run.

    Raises:
        RecipeError: If a class of the user's cannot be imported.
        OSError: If the disk is full.
    """
    trackers = list[Tracker]()
    if config.tensorboard:
        # Imported only if wanted: protobuf is slow to import.
        from raymix.training.run.event_file import EventFileWriter

        directory = run.directory / "tensorboard"
        trackers.append(EventFileWriter(directory, start_step=run.start_step))
    for number, name in enumerate(config.trackers):
        kind = _CLASSES.get(name) or _own_class(name, number)
        trackers.append(_Guarded(name, kind, run, config.tracker_options.get(name, {})))
    return trackers


def tracker_problems(config: RunConfig) -> list[str]:
    """Return a message for each tracker that is not installed, or cannot be imported."""
    problems = list[str]()
    for number, name in enumerate(config.trackers):
        if name not in TRACKERS:
            try:
                _own_class(name, number)
            except RecipeError as error:
                problems += error.problems
        elif importlib.util.find_spec(name) is None:
            path, fix = f"run.trackers.{number}", f"pip install 'raymix[{name}]'"
            problems.append(format_problem(path, name, "not installed", fix=fix))
    return problems


def _own_class(name: str, number: int) -> Any:
    module, class_name = name.split(":")
    try:
        with importing_from_here():
            return getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError.at(
            f"run.trackers.{number}", name, f"it cannot be imported: {error}"
        ) from error


def _flat(node: Any, path: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested mappings by dotted path."""
    if isinstance(node, Mapping) and node:
        return [
            leaf
            for key, value in node.items()
            for leaf in _flat(value, f"{path}.{key}" if path else str(key))
        ]
    return [(path, str(node))]
