"""The driver of a run on Ray: starts the actors and Ray Train, and translates their errors.

The driver owns its actors and workers, so Ray ends them when it is killed; the run directory stays
resumable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
from ray.train import TrainingFailedError
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from raymix._utils.compat.ray_train import LeanTorchTrainer, WorkerGroupStartupTimeoutError
from raymix._utils.private_cluster import on_loopback
from raymix.errors import ClusterLostError, RaymixError, TrainingError
from raymix.recipe import ClusterConfig, DocumentData
from raymix.store import Corpus
from raymix.store.remote import files
from raymix.streaming.batches.stream import row_tokens
from raymix.streaming.blocks.actor import start_plane
from raymix.streaming.controller.client import start_controller
from raymix.streaming.sequences.actor import start_sequence_scheduler
from raymix.training.job import Job
from raymix.training.launch.cluster import capacity_error, worker_environment
from raymix.training.launch.entry import FailFastPolicy, train_worker
from raymix.training.launch.placement import placement_options, worker_resources
from raymix.training.launch.rendezvous import torch_config
from raymix.training.plan.mixer_context import mixer_context
from raymix.training.run.domain_change import checkpoint_to_resume

_START_RETRIES = 2
# Interval at which a run with `cluster.min_workers` checks for resources for more workers. Every
# change of size restarts the workers, which takes about as long.
_RESIZE_INTERVAL_S = 30.0
_MAX_MESSAGE_CHARS = 300


def run_on_ray(job: Job, watched: Callable[[Callable[[], object]], None]) -> None:
    """Train with Ray; returns when the workers have ended, at the last step or at a stop request.

    Args:
        job: The job; its actors are started here.
        watched: Runs a function and supervises it: see `raymix.training.launch.watch`.

    Raises:
        RaymixError: If the run cannot work, or the work failed.
        KeyboardInterrupt: At the second Ctrl-C, or one before the first step.
    """
    recipe = job.recipe
    corpus = Corpus.open(recipe.corpus.path)
    newest = checkpoint_to_resume(job.run, recipe, job.steps, domains_from=job.domains_from)
    # Actors are started by the driver, not by a worker: they outlive restarts of the worker group.
    controller = start_controller(
        name=f"raymix-controller-{job.session}",
        recipe_mixer=recipe.mixer,
        context=mixer_context(recipe, corpus, steps=job.steps),
        run_dir=str(job.run.path),
        snapshot=newest[1].controller if newest else None,
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
    # Ray Train would load the snapshot of an earlier start and look for checkpoints that may be
    # gone. The workers choose the checkpoint to resume from, so it needs none.
    checkpoints = files.join(job.run.where, job.run.checkpoints.name)
    files.make_directory(checkpoints)
    files.remove(files.join(checkpoints, "checkpoint_manager_snapshot.json"))
    filesystem, storage_path = files.locate(job.run.where)
    data = job.recipe.data
    group_size = data.assign.context if isinstance(data, DocumentData) else 1
    resources = worker_resources(cluster, on_gpu=job.on_gpu)
    return LeanTorchTrainer(
        train_worker,
        train_loop_config={"job": ray.put(job)},
        alone=on_loopback(),
        torch_config=torch_config("cpu:gloo,cuda:nccl" if job.on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=_workers(cluster),
            use_gpu=job.on_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
            **placement_options(
                resources, group_size=group_size, groups=cluster.workers // group_size
            ),
        ),
        run_config=RunConfig(
            name=job.run.checkpoints.name,
            storage_path=storage_path,
            storage_filesystem=filesystem if job.run.url else None,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=_START_RETRIES
            ),
            callbacks=[FailFastPolicy(job.run)],
            worker_runtime_env={"env_vars": worker_environment(on_gpu=job.on_gpu)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _workers(cluster: ClusterConfig) -> int | tuple[int, int]:
    """Return the number of workers, or its minimum and maximum for an elastic run."""
    minimum, maximum = cluster.min_workers, cluster.workers
    # A pair makes Ray Train elastic: it looks for more resources and restarts the workers for them.
    return maximum if minimum is None or minimum == maximum else (minimum, maximum)


def user_error(error: BaseException, job: Job) -> BaseException:
    """Return the error to show the user: a worker's own `RaymixError`, or one that the run died."""
    for inner in _causes(error):
        # Ray wraps an error in a class that derives from it but has none of its attributes.
        if isinstance(inner, RaymixError) and "problems" in vars(inner):
            return inner
        if isinstance(inner, WorkerGroupStartupTimeoutError):
            seconds = float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])
            return capacity_error(job.recipe.cluster.workers, seconds * (_START_RETRIES + 1))
    log = job.run.path / "error.log"
    log.write_text(str(error), encoding="utf-8")
    # The innermost cause, and its last line, which is the message below a traceback.
    inner = list(_causes(error))[-1]
    message = (str(inner).strip().splitlines() or [""])[-1]
    lost = isinstance(inner, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError))
    return (ClusterLostError if lost else TrainingError).at(
        "run",
        job.run.where,
        f"the workers failed: {type(inner).__name__}: {message[:_MAX_MESSAGE_CHARS]}",
        fix=f"Read the full error in {log}. The same command resumes from the last checkpoint",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that Ray wrapped in it, the outer ones first."""
    # Ray has five attributes for an inner error, depending on the layer; some point back.
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += list(getattr(current, "worker_failures", {}).values())
        pending += [getattr(current, name, None) for name in ("controller_failure", "cause")]
        pending += [getattr(current, "_base_exc", None), current.__cause__]
