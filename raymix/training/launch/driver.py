"""The driver of a run on Ray: actors, Ray Train, progress, and an orderly end.

A driver that is killed takes its actors and workers with it, as it owns them; the run directory
stays resumable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from raymix._utils.compat.ray_train import WorkerGroupStartupTimeoutError
from raymix.errors import RaymixError, TrainingError
from raymix.recipe import ClusterConfig, DocumentData
from raymix.store import Corpus
from raymix.store.remote import files
from raymix.streaming.batches.stream import row_tokens
from raymix.streaming.blocks.actor import start_plane
from raymix.streaming.controller.client import start_controller
from raymix.streaming.sequences.actor import start_sequence_scheduler
from raymix.training.launch.cluster import capacity_error, worker_environment
from raymix.training.launch.placement import placement_options
from raymix.training.launch.rendezvous import torch_config
from raymix.training.launch.worker import FailFastPolicy, train_worker
from raymix.training.run.remote_run import newest_checkpoint_of
from raymix.training.setup import Job, mixer_context

_START_TRIES = 2
_RESIZE_S = 30.0
"""How often a run with `cluster.min_workers` looks for room for more; a start takes as long."""


def run_on_ray(job: Job, watched: Callable[[Callable[[], object]], None]) -> None:
    """Train with Ray; returns when the workers have ended, which may be because of a request.

    Args:
        job: What to do; its actors are started here.
        watched: Does the work it is given, and watches it: see `raymix.training.launch.watch`.

    Raises:
        RaymixError: What went wrong, in words for the user.
        KeyboardInterrupt: At the second Ctrl-C, or one before the first step.
    """
    recipe = job.recipe
    corpus = Corpus.open(recipe.corpus.path)
    found = newest_checkpoint_of(job.run)
    controller = start_controller(
        name=f"raymix-controller-{job.session}",
        recipe_mixer=recipe.mixer,
        context=mixer_context(recipe, corpus, steps=job.steps),
        run_dir=str(job.run.path),
        snapshot=found[1].controller if found else None,
        probe_interval=recipe.train.probe_interval,
    )
    plane = start_plane(
        corpus,
        row_tokens=row_tokens(recipe.data),
        cache_bytes=recipe.data.cache_bytes,
        name=f"raymix-plane-{job.session}",
    )
    scheduler = None
    if isinstance(recipe.data, DocumentData):
        scheduler = start_sequence_scheduler(
            corpus, recipe.data, name=f"raymix-sequences-{job.session}"
        )
    trainer = _trainer(
        replace(job, controller=controller, plane=plane, sequence_scheduler=scheduler)
    )
    try:
        watched(trainer.fit)
    except TrainingFailedError as error:
        raise user_error(error, job) from error


def _trainer(job: Job) -> Any:
    cluster = job.recipe.cluster
    # Ray Train would take the snapshot of an earlier start for its own and look for checkpoints
    # that may be gone; which checkpoint to start from is decided by the workers.
    checkpoints = files.join(job.run.where, job.run.checkpoints.name)
    files.make_directory(checkpoints)
    files.remove(files.join(checkpoints, "checkpoint_manager_snapshot.json"))
    filesystem, place = files.locate(job.run.where)
    data = job.recipe.data
    group = data.assign.context if isinstance(data, DocumentData) else 1
    resources = {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if job.on_gpu else {})}
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=torch_config("cpu:gloo,cuda:nccl" if job.on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=_workers(cluster),
            use_gpu=job.on_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            **placement_options(resources, group_size=group, groups=cluster.workers // group),
        ),
        run_config=RunConfig(
            name=job.run.checkpoints.name,
            storage_path=place,
            storage_filesystem=filesystem if job.run.url else None,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=_START_TRIES
            ),
            callbacks=[FailFastPolicy(job.run)],
            worker_runtime_env={"env_vars": worker_environment(on_gpu=job.on_gpu)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _workers(cluster: ClusterConfig) -> int | tuple[int, int]:
    """Return how many workers to ask for, or the fewest and the most."""
    fewest, most = cluster.min_workers, cluster.workers
    return most if fewest is None or fewest == most else (fewest, most)


def user_error(error: BaseException, job: Job) -> BaseException:
    """Return the error of a fit as one for the user: a worker's own, or what it comes down to."""
    for inner in _inside(error):
        if isinstance(inner, RaymixError) and "problems" in vars(inner):
            return inner
        if isinstance(inner, WorkerGroupStartupTimeoutError):
            seconds = float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])
            return capacity_error(job.recipe.cluster.workers, seconds * (_START_TRIES + 1))
    where = _write(job.run.path / "error.log", str(error))
    inner = list(_inside(error))[-1]
    said = (str(inner).strip().splitlines() or [""])[-1]
    return TrainingError.at(
        "run",
        job.run.where,
        f"the workers failed: {type(inner).__name__}: {said[:300]}",
        fix=f"The whole of it is in {where}. The same command goes on from the last checkpoint",
    )


def _inside(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that Ray wrapped in it, the outer ones first."""
    seen: set[int] = set()
    left: list[Any] = [error]
    while left:
        current = left.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        left += list(getattr(current, "worker_failures", {}).values())
        left += [getattr(current, name, None) for name in ("controller_failure", "cause")]
        left += [getattr(current, "_base_exc", None), current.__cause__]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
