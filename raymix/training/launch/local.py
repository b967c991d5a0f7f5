"""The loop in this process, without Ray: `cluster.workers: 0`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raymix.training.loop import LoopEnd, TrainerComponents, TrainingLoop
from raymix.training.model.parallel import World
from raymix.training.run.remote_run import keep_checkpoint
from raymix.training.setup import Job, build_parts, local_source, resume


def run_here(job: Job, *, stop_asked: Callable[[], bool]) -> LoopEnd:
    """Return how the job's loop ended in this process.

    Args:
        job: What to do; it names no actors.
        stop_asked: Whether somebody wants a clean stop.

    Raises:
        RaymixError: If the job cannot be done.
    """
    keep = job.recipe.train.keep_checkpoints
    world = World(device=torch.device("cuda" if job.on_gpu else "cpu"))
    start = resume(job, world)
    parts = build_parts(
        job,
        world,
        start,
        source=local_source(job.recipe),
        on_checkpoint=lambda path, step: keep_checkpoint(job.run, path, keep=keep),
        stop_asked=stop_asked,
    )
    return looped(parts)


def looped(parts: TrainerComponents) -> LoopEnd:
    """Return how the loop of a rank ended; its files are closed then.

    Raises:
        RaymixError: If the job cannot be done.
    """
    try:
        return TrainingLoop(parts).run()
    finally:
        if parts.recorder is not None:
            parts.recorder.close()
