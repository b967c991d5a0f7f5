"""Builds the components of a rank's training loop: model, optimizer, stream, evaluator, recorder.

`Job` is what the driver sends to the workers. `resume` chooses the checkpoint to start from, the
same on every rank; `build_components` builds the rest from it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from raymix.errors import TrainingError
from raymix.mixers import GRADIENT_STATISTICS, Mixer, build_mixer
from raymix.recipe import DocumentData, PackedData, Recipe
from raymix.signals import adam_preconditioner
from raymix.store import Corpus
from raymix.streaming.batches.assign import Assignments, assign_locally
from raymix.streaming.batches.stream import MixtureStream, row_tokens
from raymix.streaming.blocks.sources import BlockSource, LocalSource
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.local import LocalController
from raymix.streaming.sequences.step_plans import SchedulingConfig
from raymix.training.components import TrainerComponents
from raymix.training.evaluate.held_out import Evaluator, held_out_rows
from raymix.training.host.device import peak_flops, quiet_libraries, use_threads
from raymix.training.job import Job
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.finite import non_finite, some
from raymix.training.model.hf_model import measure_model
from raymix.training.model.loss import PackedLoss
from raymix.training.model.optim import build_optimizer
from raymix.training.model.parallel import Replica, World, place_model, training_precision
from raymix.training.model.run_model import run_model
from raymix.training.model.traits import probe_model
from raymix.training.plan.mixer_context import mixer_context
from raymix.training.plan.model_checks import check_traits
from raymix.training.run.checkpoint import TrainingState, disk_full
from raymix.training.run.domain_change import checkpoint_to_resume
from raymix.training.run.gauges import cluster_gauges
from raymix.training.run.identity import identity
from raymix.training.run.optimizer_state import load_optimizer, optimizer_tensors
from raymix.training.run.recorder import Recorder
from raymix.training.run.remote_run import (
    STOP_FILE,
    WORKER_FILES,
    clear_checkpoints,
    fetch_checkpoint,
)
from raymix.training.run.rundir import cut_metrics
from raymix.training.run.trackers import TrackedRun, open_trackers
from raymix.training.step.batches import max_rows_per_rank
from raymix.training.step.document_layout import scheduling_config, set_up_context_parallel
from raymix.training.step.documents import ContextParallel
from raymix.training.step.probing import Prober, ProbeReader
from raymix.training.step.rank_layout import full_length_rows

if TYPE_CHECKING:
    from raymix.streaming.controller.client import RemoteController


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where an attempt starts; chosen by rank 0 for all ranks."""

    attempt: str
    checkpoint: Path | None
    state: TrainingState | None
    micro_batch_rows: int


def recipe_hash(recipe: Recipe) -> str:
    """Return a hash of the identifying recipe fields."""
    text = json.dumps(identity(recipe.model_dump(mode="json")), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def resume(job: Job, world: World) -> ResumePoint:
    """Return where to resume, the same on every rank; rank 0 looks for the newest checkpoint.

    Also sets up this process: its threads, and libraries that would write to the run's output.

    Raises:
        RaymixError: If the run has lost its checkpoints, or they cannot be read.
    """
    quiet_libraries()
    use_threads(job.threads, world)
    start: ResumePoint | None = None
    if world.is_writer:
        if job.run.url is not None:
            job.run.path.mkdir(parents=True, exist_ok=True)
            job.run.mirror().fetch(*WORKER_FILES, STOP_FILE)
        newest = checkpoint_to_resume(job.run, job.recipe, job.steps, domains_from=job.domains_from)
        path, state = newest if newest else (None, None)
        rows = job.micro_batch_rows
        if state is not None and state.world_size == world.size:
            # The same micro-batches as before: another split would sum gradients in another order
            # and round differently, and a resumed run is promised to be bit-equal.
            auto = job.recipe.train.micro_batch_rows == "auto"
            rows = state.micro_batch_rows if auto else rows
        start = ResumePoint(uuid.uuid4().hex[:12], path, state, rows)
        clear_checkpoints(job.run, but=path)
        # Steps after the checkpoint are done again, so their lines would stand twice.
        cut_metrics(job.run.metrics, state.step if state else -1)
    agreed = world.broadcast(start)
    if agreed.checkpoint is None:
        return agreed
    return replace(agreed, checkpoint=fetch_checkpoint(job.run, agreed.checkpoint))


def build_components(
    job: Job,
    world: World,
    start: ResumePoint,
    *,
    source: Callable[[Corpus], BlockSource],
    on_checkpoint: Callable[[Path, int], None],
    stop_requested: Callable[[], bool],
) -> TrainerComponents:
    """Return the components of this rank's training loop.

    Args:
        job: The job.
        world: This rank.
        start: Where to resume.
        source: Makes the source of blocks.
        on_checkpoint: Called on every rank after each checkpoint.
        stop_requested: Whether a clean stop has been requested; read on rank 0.

    Raises:
        RaymixError: If model, corpus or checkpoint cannot be used.
    """
    recipe, state, stage = job.recipe, start.state, _stages(job, world, start.state)
    corpus = Corpus.open(recipe.corpus.path)
    bf16 = recipe.train.uses_bf16(on_gpu=world.device.type == "cuda")
    mixer = build_mixer(recipe.mixer, mixer_context(recipe, corpus, steps=job.steps))
    loss, flops = _loss(recipe, corpus, start, mixer.needs)
    context_parallel, assignments, scheduling = _sequence_scheduling(job, world, start, loss)
    # Before the optimizer is made: FSDP2 shards parameters in place, and it must hold the shards.
    replica = place_model(loss, recipe.train, world, bf16=bf16)
    optimizer = build_optimizer(replica.model, recipe.train, sharded=replica.sharded)
    if start.checkpoint is not None:
        load_optimizer(start.checkpoint, replica, optimizer)
        _check_finite(optimizer_tensors(replica, optimizer), start.checkpoint, world)
    control = _control(job, world, start, corpus)
    return TrainerComponents(
        recipe=recipe,
        steps=job.steps,
        domains=corpus.domain_names,
        replica=replica,
        optimizer=optimizer,
        stream=MixtureStream(
            corpus,
            recipe.data,
            seed=recipe.seed,
            rank=world.rank,
            world_size=world.size,
            controller=control,
            source=source(corpus),
            assignments=assignments,
            state=state.sampler if state else None,
            limit=job.steps,
        ),
        evaluator=_evaluator(recipe, corpus, world, start, context_parallel),
        recorder=_recorder(job, world, start, corpus, scheduling),
        checkpoints=job.run.checkpoints,
        corpus=corpus,
        recipe_hash=recipe_hash(recipe),
        micro_batch_rows=start.micro_batch_rows,
        max_rank_rows=_max_rank_rows(recipe, world),
        resumed=state,
        bf16=bf16,
        flops_per_token=flops,
        peak_flops=peak_flops(world.device),
        snapshot=control.snapshot,
        on_checkpoint=on_checkpoint,
        stop_requested=stop_requested,
        stage=stage,
        push=control.push if mixer.needs else None,
        prober=_prober(recipe, corpus, mixer, replica, optimizer, start),
        context_parallel=context_parallel,
    )


def _stages(job: Job, world: World, state: TrainingState | None) -> Callable[[str], None]:
    """Return the function that says that a stage begins, after it has said so of the first."""
    # One rank speaks for all.
    say: Callable[[str], None] = job.run.add_stage if world.is_writer else lambda text: None
    at_step = f", from the checkpoint at step {state.step:,}" if state else ""
    say(f"building the model{at_step}")
    return say


def _sequence_scheduling(
    job: Job, world: World, start: ResumePoint, loss: PackedLoss
) -> tuple[ContextParallel, Assignments | None, SchedulingConfig | None]:
    """Return context parallelism, assignments and their configuration; nothing for packed rows."""
    recipe, data = job.recipe, job.recipe.data
    if not isinstance(data, DocumentData):
        return ContextParallel(), None, None
    model = loss.model
    context_parallel = set_up_context_parallel(recipe, data, model, world, loss.isolation)
    rows = start.micro_batch_rows
    config = scheduling_config(recipe, data, model, rows=rows, on_gpu=job.on_gpu)
    if job.sequence_scheduler is None:
        return context_parallel, assign_locally(config.layout, config.cost, config.planner), config
    from raymix.streaming.sequences.actor import assign_remotely

    assignments = assign_remotely(job.sequence_scheduler, config, attempt=start.attempt)
    return context_parallel, assignments, config


def _evaluator(
    recipe: Recipe, corpus: Corpus, world: World, start: ResumePoint, context: ContextParallel
) -> Evaluator:
    rows = held_out_rows(
        corpus,
        sequence_length=recipe.data.sequence_length,
        rows_per_domain=recipe.eval.rows_per_domain,
    )
    batch_rows = full_length_rows(recipe, start.micro_batch_rows)
    by_document = isinstance(recipe.data, DocumentData) and context.own_attention
    return Evaluator(
        corpus, rows, world=world, micro_batch_rows=batch_rows, by_document=by_document
    )


def _loss(
    recipe: Recipe, corpus: Corpus, start: ResumePoint, needs: frozenset[str]
) -> tuple[PackedLoss, float]:
    """Return the model with its loss, and its floating-point operations per token."""
    info = corpus.manifest.tokenizer
    facts = CorpusFacts(info.vocab_size, info.eos_id, recipe.data.sequence_length)
    model = run_model(recipe, facts, start.checkpoint)
    if start.checkpoint is not None:
        # Before the model is tested: with such weights no test has a meaning.
        _check_finite(dict(model.named_parameters()), start.checkpoint, World())
    flops = measure_model(model, facts.sequence_length).flops_per_token
    traits = probe_model(model)
    # Packed rows of documents that attend to each other train on a wrong objective without any
    # sign of it in the loss.
    check_traits(traits, recipe, needs, model.config.model_type)
    loss = PackedLoss(model, linear_head=traits.linear_head, isolation=traits.isolation)
    return loss, flops


def _check_finite(tensors: dict[str, torch.Tensor], checkpoint: Path, world: World) -> None:
    """Raise if tensors that were loaded from a checkpoint are not finite; a collective."""
    bad = non_finite(tensors, world)
    if bad:
        raise TrainingError.at(
            "checkpoint",
            str(checkpoint),
            f"poisoned: {some(bad, len(tensors))}, hold numbers that are not finite",
            fix="Go back to an earlier one: raymix train RECIPE --from-step N",
        )


def _control(
    job: Job, world: World, start: ResumePoint, corpus: Corpus
) -> LocalController | RemoteController:
    if job.controller is not None:
        # Here, because Ray is not loaded in a run without workers.
        from raymix.streaming.controller.client import RemoteController

        return RemoteController(
            job.controller, attempt=start.attempt, rank=world.rank, world_size=world.size
        )
    state = build_mixture_state(
        job.recipe.mixer,
        mixer_context(job.recipe, corpus, steps=job.steps),
        run_dir=str(job.run.path),
        snapshot=start.state.controller if start.state else None,
        probe_interval=job.recipe.train.probe_interval,
        session=job.session,
    )
    return LocalController(state)


def _prober(
    recipe: Recipe,
    corpus: Corpus,
    mixer: Mixer,
    replica: Replica,
    optimizer: Optimizer,
    start: ResumePoint,
) -> Prober | None:
    """Return the gradient probe that the mixer needs; None where it needs none."""
    if not GRADIENT_STATISTICS & mixer.needs:
        return None
    length = recipe.data.sequence_length
    targets = [corpus.domain_names.index(name) for name in recipe.mixer.targets]
    config = recipe.train.probe
    device = replica.world.device.type
    return Prober(
        ProbeReader(corpus, sequence_length=length, seed=recipe.seed),
        replica.model,
        replica.world,
        config,
        needs=mixer.needs,
        n_domains=len(corpus.domain_names),
        targets=targets,
        group_ND=getattr(mixer, "probe_groups", None),
        micro_batch_rows=full_length_rows(recipe, start.micro_batch_rows),
        precision=partial(
            training_precision, device, bf16=recipe.train.uses_bf16(on_gpu=device == "cuda")
        ),
        metric=adam_preconditioner(optimizer) if config.precondition == "adam" else None,
    )


def _max_rank_rows(recipe: Recipe, world: World) -> int | None:
    """Return the rows of the rank with the most; None where every rank has as many."""
    if isinstance(recipe.data, PackedData):
        return max_rows_per_rank(recipe.data.rows_per_step, world.size)
    return None


def _recorder(
    job: Job, world: World, start: ResumePoint, corpus: Corpus, scheduling: SchedulingConfig | None
) -> Recorder | None:
    if not world.is_writer:
        return None
    tokens = {name: corpus.split(name, "train").tokens for name in corpus.domain_names}
    read = start.state.tokens if start.state else {}
    tracked = TrackedRun(
        id=job.tracking_id,
        name=job.run.path.name,
        directory=job.run.path,
        start_step=start.state.step if start.state else 0,
        recipe=job.recipe.model_dump(mode="json"),
    )
    try:
        trackers = open_trackers(job.recipe.run, tracked)
    except OSError as error:
        raise disk_full(error, job.run.path) from error
    return Recorder(
        job.run,
        trackers=trackers,
        gauges=cluster_gauges(job.run.path.name, tokens, read=read),
        scheduled=scheduling.document() if scheduling is not None else None,
    )


def local_source(recipe: Recipe) -> Callable[[Corpus], BlockSource]:
    """Return a factory of sources that read blocks in this process."""
    return lambda corpus: LocalSource(corpus, row_tokens=row_tokens(recipe.data))
