"""Training in this process, without Ray: `cluster.workers: 0`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raymix.training.components import TrainerComponents
from raymix.training.job import Job
from raymix.training.loop import LoopEnd, TrainingLoop
from raymix.training.model.parallel import World
from raymix.training.run.remote_run import upload_checkpoint
from raymix.training.run.rundir import STALLS
from raymix.training.run.stalls import report_stalls
from raymix.training.setup import build_components, local_source, resume


def run_in_process(job: Job, *, stop_requested: Callable[[], bool]) -> LoopEnd:
    """Train in this process, and return how the loop ended.

    Args:
        job: The job, without actors.
        stop_requested: Whether a clean stop has been requested.

    Raises:
        RaymixError: If the job cannot be done.
    """
    keep = job.recipe.train.keep_checkpoints
    # One rank: no process group is set up, and collectives are skipped.
    world = World(device=torch.device("cuda" if job.on_gpu else "cpu"))
    start = resume(job, world)
    components = build_components(
        job,
        world,
        start,
        source=local_source(job.recipe),
        on_checkpoint=lambda path, step: upload_checkpoint(job.run, path, keep=keep),
        stop_requested=stop_requested,
    )
    return run_loop(components)


def run_loop(components: TrainerComponents) -> LoopEnd:
    """Run the training loop of a rank, close its files, and return how it ended.

    Raises:
        RaymixError: If the job cannot be done.
    """
    loop = TrainingLoop(components)
    watch = report_stalls(
        components.checkpoints.parent / STALLS,
        rank=components.replica.world.rank,
        step=lambda: loop.step,
        seconds=components.recipe.run.stall_seconds,
    )
    try:
        with watch:
            return loop.run()
    finally:
        # Also after an error: TensorBoard's file is buffered, and its last points tell why.
        if components.recorder is not None:
            components.recorder.close()
