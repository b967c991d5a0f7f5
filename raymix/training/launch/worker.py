"""The training loop as a worker of Ray Train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode

from raymix.errors import TrainingError
from raymix.store import Corpus
from raymix.store.remote import files
from raymix.streaming.batches.stream import row_tokens
from raymix.streaming.blocks.shared_source import PlaneSource
from raymix.streaming.blocks.sources import BlockSource
from raymix.training.job import Job
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
from raymix.training.setup import build_components, resume


def run_worker(job: Job) -> None:
    """Run one rank's loop under Ray Train.

    Raises:
        RaymixError: If the job cannot be done.
    """
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
