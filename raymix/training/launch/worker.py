"""The loop as Ray Train runs it on every worker, and what stops a run that cannot go on."""

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
        RaymixError: What the user can act on.
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
    parts = build_components(
        job,
        world,
        start,
        source=_plane_source(job, world),
        on_checkpoint=_reporter(job, world),
        stop_requested=job.run.stop_request.exists,
    )
    kept = (*WORKER_FILES, "tensorboard") if world.is_writer else ()
    try:
        with RunSync(job.run, send=kept, fetch=(STOP_FILE,) if world.is_writer else ()):
            end = run_loop(parts)
        if world.is_writer and not end.stopped:
            remove_working_copy(job.run)
    except torch.OutOfMemoryError as error:
        wrong = f"a worker ran out of GPU memory: {str(error).splitlines()[0]}"
        advice = "Lower it, or set train.activation_checkpointing"
        path, rows = "train.micro_batch_rows", parts.micro_batch_rows
        raise TrainingError.at(path, rows, wrong, fix=advice) from error


def _world(job: Job) -> World:
    context = ray.train.get_context()
    device = torch.device("cpu")
    # Ray's own answer is cuda:0 wherever it counts GPUs, even where torch has none.
    if job.on_gpu and torch.cuda.is_available():
        device = ray.train.torch.get_device()
    return World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        neighbors=context.get_local_world_size(),
    )


def _plane_source(job: Job, world: World) -> Callable[[Corpus], BlockSource]:
    tokens = row_tokens(job.recipe.data)
    return lambda corpus: PlaneSource(
        job.plane, row_tokens=tokens, rank=world.rank, world_size=world.size
    )


def _reporter(job: Job, world: World) -> Callable[[Path, int], None]:
    """Return what keeps a checkpoint and tells Ray Train of it, which has nothing to copy."""
    keep = job.recipe.train.keep_checkpoints

    def report(path: Path, step: int) -> None:
        checkpoint = None
        if world.is_writer:
            upload_checkpoint(job.run, path, keep=keep)
            place = files.join(job.run.where, job.run.checkpoints.name, path.name)
            filesystem, inside = files.locate(place)
            checkpoint = Checkpoint(inside, filesystem)
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    return report


class FailFastPolicy(UserCallback):
    """Ends a run at once where starting the workers again would change nothing.

    Ray Train starts a worker group again after any exception. That is right for a lost machine;
    it is not for an error the user must mend, nor for one that comes back at the same step. An
    exception in a callback ends the run, and reaches the driver.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Judge progress by the run's metrics."""
        self._run = run
        self._last: tuple[int, str] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise where there is no hope.

        Raises:
            RaymixError: That of a worker, or that the same error came twice.
        """
        for error in worker_exceptions.values():
            if isinstance(error, RaymixError):
                raise error
        first = next(iter(worker_exceptions.values()))
        if self._run.url is not None:
            self._run.mirror().fetch(self._run.metrics.name)
        last = max((line["step"] for line in read_metrics(self._run.metrics)), default=0)
        seen = (last, f"{type(first).__name__}: {first}"[:500])
        if seen == self._last:
            said = "".join(traceback.format_exception_only(first)).strip().splitlines()[-1]
            raise TrainingError.at(
                "step", seen[0], f"the workers failed twice in the same way: {said}"
            )
        self._last = seen
