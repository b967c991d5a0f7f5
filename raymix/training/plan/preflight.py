"""Preflight: the plan of a run before it starts, and all reasons why it cannot work.

`preflight` reads the recipe, the prepared corpus (or the sizes of its sources), the model's
configuration and the resources. It trains nothing, allocates nothing and needs no GPU. All
problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raymix.errors import RaymixError, RecipeError
from raymix.mixers import MixerContext, PlannedMixer, build_mixer, describe
from raymix.recipe import (
    ByteTokenizer,
    PackedData,
    PretrainedTokenizer,
    Recipe,
    TrainedTokenizer,
)
from raymix.recipe.training import AUTO_CACHE_SHARE
from raymix.store import Corpus
from raymix.store.manifest import MANIFEST
from raymix.store.remote import files
from raymix.training.host.machine import Resources, disk_free
from raymix.training.model.facts import CorpusFacts
from raymix.training.plan.batch_shape import BatchShape
from raymix.training.plan.checks import (
    cap_problems,
    cluster_problems,
    corpus_problems,
    disk_problems,
    empty_domain_problems,
    max_epochs_by_domain,
    memory_problems,
    probe_problems,
)
from raymix.training.plan.cluster_resources import run_resources
from raymix.training.plan.domain_sizes import DomainSizes, estimated_sizes, prepared_sizes
from raymix.training.plan.forecast import Forecast, Segment, forecast, mixture_segments
from raymix.training.plan.model_checks import model_notes
from raymix.training.plan.model_cost import model_cost
from raymix.training.plan.notes import cluster_notes, plan_notes
from raymix.training.plan.runplan import DomainPlan, RunPlan
from raymix.training.plan.target_counts import target_domain_counts
from raymix.training.run.rundir import RunDirectory
from raymix.training.run.trackers import tracker_problems


def plan_run(recipe: Recipe) -> RunPlan:
    """Return the plan of `recipe` on the cluster that it names, or else on this machine.

    Raises:
        RaymixError: If the run cannot work.
    """
    prepared = files.exists(files.join(recipe.corpus.path, MANIFEST))
    # A recipe without sources needs a prepared corpus: opening it says what is missing.
    corpus = Corpus.open(recipe.corpus.path) if prepared or not recipe.corpus.domains else None
    return preflight(recipe, corpus, run_resources(recipe))


def preflight(recipe: Recipe, corpus: Corpus | None, available: Resources) -> RunPlan:
    """Return the plan of a run.

    Args:
        recipe: The recipe, its paths resolved.
        corpus: The prepared corpus; None if it is not prepared, and tokens are estimated from the
            sources.
        available: Resources of the machine or cluster.

    Raises:
        RecipeError: If the run cannot work, with one message per reason.
    """
    checks = _Checks([*cluster_problems(recipe, available), *tracker_problems(recipe.run)])
    sizes = _domain_sizes(recipe, corpus, checks)
    shape = BatchShape.of(recipe, available)
    free = disk_free(str(RunDirectory.at(recipe.run_dir).path))
    mixture = cost = None
    with checks.collect_errors():
        cost = model_cost(recipe, corpus_facts(recipe, corpus), shape, available)
        checks.problems += memory_problems(recipe, cost.parts, available, on_gpu=shape.on_gpu)
        checks.problems += disk_problems(recipe, cost.checkpoint_bytes, free)
    with checks.collect_errors():
        mixture = _Mixture.of(recipe, corpus, sizes, shape) if sizes else None
    checks.problems += (empty := empty_domain_problems(sizes, recipe, _unread(recipe, mixture)))
    # An empty domain has no epochs to forecast; its own message is enough.
    if mixture is not None and not empty:
        checks.problems += cap_problems(
            recipe, sizes, mixture.forecast, steps=shape.steps, tokens_per_step=shape.tokens
        )
        with checks.collect_errors():
            checks.model_notes = model_notes(recipe, corpus_facts(recipe, corpus), mixture.needs)
    if checks.problems or mixture is None or cost is None:
        # A dict drops repeated messages and keeps their order: two checks may meet one fault.
        raise RecipeError(*dict.fromkeys(checks.problems))
    return RunPlan(
        name=recipe.name,
        run_dir=recipe.run_dir,
        steps=shape.steps,
        tokens=shape.steps * shape.tokens,
        tokens_per_step=shape.tokens,
        sequence_length=recipe.data.sequence_length,
        packed=isinstance(recipe.data, PackedData),
        row_tokens=shape.row_tokens,
        context_parallel=shape.context_parallel,
        rows_per_step=shape.rows,
        workers=recipe.cluster.workers,
        rows_per_worker=shape.rows_per_worker,
        micro_batch_rows=cost.micro_batch_rows,
        on_gpu=shape.on_gpu,
        estimated=corpus is None,
        corpus_path=recipe.corpus.path,
        domains=tuple(_domain_plans(recipe, sizes, mixture.forecast)),
        mixer=mixture.summary,
        segments=tuple(mixture.segments),
        parameters=cost.parameters,
        trainable=cost.trainable,
        flops_per_token=cost.flops_per_token,
        worker_memory=cost.parts,
        cache_bytes=_cache_bytes(recipe, available),
        checkpoint_bytes=cost.checkpoint_bytes,
        keep_checkpoints=recipe.train.keep_checkpoints,
        disk_free=free,
        resources=available,
        notes=(
            *checks.model_notes,
            *cluster_notes(recipe.cluster, available),
            *plan_notes(recipe, sizes, mixture.forecast, shape.steps, cost),
        ),
    )


@dataclass(slots=True)
class _Checks:
    problems: list[str] = field(default_factory=list)
    model_notes: tuple[str, ...] = ()

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Add the problems of an error raised inside, and suppress it."""
        try:
            yield
        except RaymixError as error:
            self.problems.extend(error.problems)


def _unread(recipe: Recipe, mixture: _Mixture | None) -> NDArray[np.bool_] | None:
    """Return which domains the recipe gives no share and measures nothing of, shape (D,)."""
    if mixture is None or not mixture.planned:
        return None
    share_SD = np.array([segment.share_D for segment in mixture.segments])
    targets = [name in recipe.mixer.targets for name in mixture.domains]
    return ~(share_SD > 0).any(axis=0) & ~np.array(targets)


def _domain_sizes(recipe: Recipe, corpus: Corpus | None, checks: _Checks) -> list[DomainSizes]:
    """Return the sizes of the domains, or none where their problems have been collected."""
    with checks.collect_errors():
        if corpus is None:
            return estimated_sizes(recipe.corpus, recipe.data)
        checks.problems += corpus_problems(recipe, corpus)
        return prepared_sizes(corpus, recipe.data)
    return []


@dataclass(frozen=True, slots=True)
class _Mixture:
    """The mixer's requested shares and the tokens they read."""

    summary: str
    """The mixer in words."""
    needs: frozenset[str]
    """Statistics that the mixer reads."""
    segments: list[Segment]
    forecast: Forecast
    domains: tuple[str, ...]
    planned: bool
    """Whether the shares of all steps are known before the run."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        corpus: Corpus | None,
        sizes: Sequence[DomainSizes],
        shape: BatchShape,
    ) -> _Mixture:
        context = MixerContext(
            domains=tuple(domain.name for domain in sizes),
            # At least 1: a domain without tokens is refused where the mixer would give it a share.
            tokens_D=np.array([max(domain.tokens, 1) for domain in sizes], dtype=np.int64),
            total_tokens=shape.steps * shape.tokens,
            total_steps=shape.steps,
            rows_per_step=shape.rows,
            targets=recipe.mixer.targets,
            nearest_D=target_domain_counts(recipe, corpus) if corpus is not None else None,
        )
        mixer = build_mixer(recipe.mixer, context)
        problems = probe_problems(recipe, sizes, mixer)
        if problems:
            raise RecipeError(*problems)
        segments = mixture_segments(mixer, context, recipe.train.probe_interval)
        caps = [np.inf if cap is None else cap for cap in max_epochs_by_domain(recipe, sizes)]
        # A cap is a whole number of tokens, never more than the epochs allow.
        cap_D = np.array(
            [np.floor(c * d.usable) if d.usable else 0 for c, d in zip(caps, sizes, strict=True)]
        )
        tokens = forecast(segments, tokens_per_step=shape.tokens, cap_D=cap_D)
        planned = isinstance(mixer, PlannedMixer)
        return cls(
            describe(mixer), mixer.needs, segments, tokens, domains=context.domains, planned=planned
        )


def corpus_facts(recipe: Recipe, corpus: Corpus | None) -> CorpusFacts:
    """Return the model's inputs from the corpus, or from the recipe if it is not prepared."""
    length, tokenizer = recipe.data.sequence_length, recipe.corpus.tokenizer
    if corpus is not None:
        info = corpus.manifest.tokenizer
        return CorpusFacts(info.vocab_size, info.eos_id, length)
    if isinstance(tokenizer, ByteTokenizer):
        # 256 bytes and the end of a document.
        return CorpusFacts(257, 256, length)
    if isinstance(tokenizer, TrainedTokenizer):
        # Trained tokenizers number the end of a document first.
        return CorpusFacts(tokenizer.vocab_size, 0, length)
    return _pretrained_facts(tokenizer, length)


def _pretrained_facts(tokenizer: PretrainedTokenizer, length: int) -> CorpusFacts:
    from raymix.corpus.tokenizers.tokenizer import load_pretrained

    info = load_pretrained(tokenizer).info
    return CorpusFacts(info.vocab_size, info.eos_id, length)


def _domain_plans(
    recipe: Recipe, sizes: Sequence[DomainSizes], forecast: Forecast
) -> Iterator[DomainPlan]:
    caps = max_epochs_by_domain(recipe, sizes)
    for index, domain in enumerate(sizes):
        cap_step = forecast.cap_step_D[index]
        yield DomainPlan(
            sizes=domain,
            share=float(forecast.share_D[index]),
            read=round(forecast.read_D[index]),
            epochs=float(forecast.read_D[index]) / max(domain.usable, 1),
            max_epochs=caps[index],
            capped_at=None if np.isinf(cap_step) else int(cap_step),
        )


def _cache_bytes(recipe: Recipe, available: Resources) -> int:
    # Without Ray blocks are read in the training process, with no object store.
    if recipe.cluster.workers == 0:
        return 0
    size = recipe.data.cache_bytes
    return int(AUTO_CACHE_SHARE * available.object_store_bytes) if size == "auto" else size
