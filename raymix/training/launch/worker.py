"""The training loop as a worker of Ray Train, and the policy that ends a run on repeated errors."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, UserCallback
from ray.train.v2.api.report_config import CheckpointUploadMode

from raymix.errors import RaymixError, TrainingError
from raymix.store import Corpus
from raymix.store.remote import files
from raymix.streaming.batches.stream import row_tokens
from raymix.streaming.blocks.shared_source import PlaneSource
from raymix.streaming.blocks.sources import BlockSource
from raymix.training.launch.local import run_loop
from raymix.training.model.parallel import World
from raymix.training.run.checkpoint import disk_full
from raymix.training.run.remote_run import (
    STOP_FILE,
    WORKER_FILES,
    RunSync,
    remove_working_copy,
    upload_checkpoint,
)
from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.training.setup import Job, build_components, resume


def train_worker(config: dict[str, Any]) -> None:
    """Run one rank's loop under Ray Train; `config["job"]` is the `Job`.

    Raises:
        RaymixError: If the job cannot be done.
    """
    job: Job = config["job"]
    job = replace(job, run=job.run.on_worker())
    try:
        _train(job)
    except OSError as error:
        raise disk_full(error, job.run.path) from error


def _train(job: Job) -> None:
    world = _world(job)
    start = resume(job, world)
    components = build_components(
        job,
        world,
        start,
        source=_plane_source(job, world),
        on_checkpoint=_checkpoint_reporter(job, world),
        stop_requested=job.run.stop_request.exists,
    )
    written = (*WORKER_FILES, "tensorboard") if world.is_writer else ()
    try:
        with RunSync(job.run, send=written, fetch=(STOP_FILE,) if world.is_writer else ()):
            end = run_loop(components)
        # A stopped run may be resumed on this machine, and then needs no download.
        if world.is_writer and not end.stopped:
            remove_working_copy(job.run)
    except torch.OutOfMemoryError as error:
        # As a RaymixError, so that the policy below ends the run: another attempt would run out of
        # memory at the same step. The first line is enough; the others are allocator statistics.
        raise TrainingError.at(
            "train.micro_batch_rows",
            components.micro_batch_rows,
            f"a worker ran out of GPU memory: {str(error).splitlines()[0]}",
            fix="Lower it, or set train.activation_checkpointing",
        ) from error


def _world(job: Job) -> World:
    context = ray.train.get_context()
    device = torch.device("cpu")
    # Ray's answer is cuda:0 wherever it counts GPUs, even if torch cannot use them.
    if job.on_gpu and torch.cuda.is_available():
        device = ray.train.torch.get_device()
    return World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        local_size=context.get_local_world_size(),
    )


def _plane_source(job: Job, world: World) -> Callable[[Corpus], BlockSource]:
    tokens = row_tokens(job.recipe.data)
    return lambda corpus: PlaneSource(
        job.plane, row_tokens=tokens, rank=world.rank, world_size=world.size
    )


def _checkpoint_reporter(job: Job, world: World) -> Callable[[Path, int], None]:
    """Return the callback that uploads a checkpoint and reports it to Ray Train."""
    keep = job.recipe.train.keep_checkpoints

    def report(path: Path, step: int) -> None:
        checkpoint = None
        if world.is_writer:
            upload_checkpoint(job.run, path, keep=keep)
            location = files.join(job.run.where, job.run.checkpoints.name, path.name)
            filesystem, path_in_store = files.locate(location)
            checkpoint = Checkpoint(path_in_store, filesystem)
        # On every rank, because Ray Train waits for all reports. NO_UPLOAD: the checkpoint is in
        # place already, and Ray would copy it again.
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    return report


class FailFastPolicy(UserCallback):
    """Ends a run at once if restarting the workers cannot help.

    Ray Train restarts the worker group after any exception. That is right for a lost machine, but
    not for an error that the user must fix, nor for one that recurs at the same step. An exception
    in a callback ends the run, and reaches the driver.
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
        for error in worker_exceptions.values():
            if isinstance(error, RaymixError):
                raise error
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
