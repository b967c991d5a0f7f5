"""What a run would do, worked out before it starts, and a refusal of what cannot work.

`preflight` looks at the recipe, the prepared corpus (or the sizes of its sources), the model's
configuration and the machine. It trains nothing, allocates nothing and needs no GPU. Everything
wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from raymix.errors import RaymixError, RecipeError
from raymix.mixers import MixerContext, build_mixer, describe
from raymix.recipe import (
    ByteTokenizer,
    DocumentData,
    PackedData,
    PretrainedTokenizer,
    Recipe,
    ScheduleMixer,
    TrainedTokenizer,
)
from raymix.recipe.training import AUTO_CACHE_SHARE
from raymix.store import Corpus
from raymix.store.manifest import MANIFEST
from raymix.store.remote import files
from raymix.training.host.machine import Resources, disk_free, resources
from raymix.training.model.hf_model import CorpusFacts, model_size
from raymix.training.model.memory import (
    Batch,
    MemoryPart,
    auto_micro_batch_rows,
    checkpoint_bytes,
    worker_memory,
)
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
from raymix.training.plan.domain_sizes import DomainSizes, estimated_sizes, prepared_sizes
from raymix.training.plan.forecast import Forecast, Segment, forecast, mixture_segments
from raymix.training.plan.runplan import DomainPlan, RunPlan
from raymix.training.plan.target_counts import target_domain_counts
from raymix.training.run.rundir import RunDirectory
from raymix.training.step.document_layout import context_parallel_size, tokens_per_rank

# Beyond about four passes repeated text teaches markedly less (Muennighoff et al. 2023, fig. 1).
_MANY_EPOCHS = 4.0
_MUCH_DROPPED = 0.05
# What a GPU is taken to have where the workers' GPUs cannot be seen from here.
_USUAL_GPU_BYTES = 16 * 10**9


def plan_run(recipe: Recipe) -> RunPlan:
    """Return what a run of `recipe` would do on the cluster it names, or else this machine.

    Raises:
        RaymixError: If the run cannot work.
    """
    prepared = files.exists(files.join(recipe.corpus.path, MANIFEST))
    # A recipe without sources needs a prepared corpus: opening it says what is missing.
    corpus = Corpus.open(recipe.corpus.path) if prepared or not recipe.corpus.domains else None
    cluster = recipe.cluster
    # Without workers no cluster is used, wherever RAY_ADDRESS points.
    has = resources(cluster.address if cluster.workers else "local", cluster.object_store_bytes)
    return preflight(recipe, corpus, has)


def preflight(recipe: Recipe, corpus: Corpus | None, has: Resources) -> RunPlan:
    """Return what a run of `recipe` would do.

    Args:
        recipe: The recipe, its paths resolved.
        corpus: The prepared corpus; None where there is none yet: then tokens are estimated from
            the sources.
        has: What the run may use.

    Raises:
        RecipeError: If the run cannot work, with one message per reason.
    """
    found = _Findings(cluster_problems(recipe, has))
    supply: list[DomainSizes] = []
    with found.guard():
        if corpus is None:
            supply = estimated_sizes(recipe.corpus, recipe.data)
        else:
            found.problems += corpus_problems(recipe, corpus)
            supply = prepared_sizes(corpus, recipe.data)
    empty = empty_domain_problems(supply, recipe)
    found.problems += empty
    shape = _BatchShape.of(recipe, has)
    mixture = weight = None
    with found.guard():
        weight = _Weight.of(recipe, corpus, shape, has)
        found.problems += memory_problems(recipe, weight.parts, has, on_gpu=shape.on_gpu)
    with found.guard():
        mixture = _Mixture.of(recipe, corpus, supply, shape) if supply and not empty else None
    if mixture is not None:
        found.problems += cap_problems(
            recipe, supply, mixture.forecast, steps=shape.steps, tokens=shape.tokens
        )
    free = disk_free(str(RunDirectory.at(recipe.run_dir).path))
    if weight is not None:
        found.problems += disk_problems(recipe, checkpoint_bytes(weight.parameters), free)
    if found.problems or mixture is None or weight is None:
        raise RecipeError(*dict.fromkeys(found.problems))
    return RunPlan(
        name=recipe.name,
        run_dir=recipe.run_dir,
        steps=shape.steps,
        tokens=shape.steps * shape.tokens,
        tokens_per_step=shape.tokens,
        sequence_length=recipe.data.sequence_length,
        packed=isinstance(recipe.data, PackedData),
        row_tokens=shape.row_tokens,
        sharing=shape.sharing,
        rows_per_step=shape.rows,
        workers=recipe.cluster.workers,
        rows_per_worker=shape.rows_per_worker,
        micro_batch_rows=weight.micro_batch_rows,
        on_gpu=shape.on_gpu,
        estimated=corpus is None,
        corpus_path=recipe.corpus.path,
        domains=tuple(_domain_plans(recipe, supply, mixture.forecast)),
        mixer=mixture.summary,
        pieces=tuple(mixture.asked),
        parameters=weight.parameters,
        flops_per_token=weight.flops_per_token,
        worker_memory=weight.parts,
        cache_bytes=_cache_bytes(recipe, has),
        checkpoint_bytes=checkpoint_bytes(weight.parameters),
        keep_checkpoints=recipe.train.keep_checkpoints,
        disk_free=free,
        resources=has,
        notes=tuple(_notes(recipe, supply, mixture.forecast, shape)),
    )


@dataclass(slots=True)
class _Findings:
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep the problems of an error raised inside, and go on."""
        try:
            yield
        except RaymixError as error:
            self.problems.extend(error.problems)


@dataclass(frozen=True, slots=True)
class _BatchShape:
    """The run in numbers that follow from the recipe alone."""

    steps: int
    tokens: int
    """Per step."""
    rows: int
    """Per step; of packed documents about as many."""
    rows_per_worker: tuple[int, int]
    row_tokens: int
    """What a worker holds of a row: of documents that workers share, a part."""
    sharing: int
    on_gpu: bool
    bf16: bool

    @classmethod
    def of(cls, recipe: Recipe, has: Resources) -> _BatchShape:
        data, train, workers = recipe.data, recipe.train, max(1, recipe.cluster.workers)
        row_tokens, sharing, shared_rows = data.sequence_length, 1, data.step_rows
        if isinstance(data, DocumentData):
            row_tokens = tokens_per_rank(data, recipe.cluster.workers)
            sharing = context_parallel_size(data, recipe.cluster.workers)
            # A worker holds a part of each document that several share, so it holds more of them.
            shared_rows = -(-data.step_tokens // row_tokens)
        on_gpu = recipe.cluster.gpus_per_worker == 1 or (
            recipe.cluster.gpus_per_worker == "auto" and has.gpus >= workers
        )
        return cls(
            steps=train.steps or -(-(train.tokens or 0) // data.step_tokens),
            tokens=data.step_tokens,
            rows=data.step_rows,
            rows_per_worker=(shared_rows // workers, -(-shared_rows // workers)),
            row_tokens=row_tokens,
            sharing=sharing,
            on_gpu=on_gpu,
            bf16=train.uses_bf16(on_gpu=on_gpu),
        )


@dataclass(frozen=True, slots=True)
class _Mixture:
    """What the mixer asks for and what that reads."""

    summary: str
    asked: list[Segment]
    forecast: Forecast

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        corpus: Corpus | None,
        supply: Sequence[DomainSizes],
        shape: _BatchShape,
    ) -> _Mixture:
        context = MixerContext(
            domains=tuple(domain.name for domain in supply),
            tokens_D=np.array([domain.tokens for domain in supply], dtype=np.int64),
            total_tokens=shape.steps * shape.tokens,
            total_steps=shape.steps,
            rows_per_step=shape.rows,
            targets=recipe.mixer.targets,
            nearest_D=target_domain_counts(recipe, corpus) if corpus is not None else None,
        )
        mixer = build_mixer(recipe.mixer, context)
        few = probe_problems(recipe, supply, mixer)
        if few:
            raise RecipeError(*few)
        asked = mixture_segments(mixer, context, recipe.train.probe_interval)
        caps = [np.inf if cap is None else cap for cap in max_epochs_by_domain(recipe, supply)]
        cap_D = np.array([np.floor(c * d.usable) for c, d in zip(caps, supply, strict=True)])
        return cls(
            describe(mixer), asked, forecast(asked, tokens_per_step=shape.tokens, cap_D=cap_D)
        )


@dataclass(frozen=True, slots=True)
class _Weight:
    """What the model weighs and works."""

    parameters: int
    flops_per_token: float
    parts: tuple[MemoryPart, ...]
    micro_batch_rows: int

    @classmethod
    def of(
        cls, recipe: Recipe, corpus: Corpus | None, shape: _BatchShape, has: Resources
    ) -> _Weight:
        facts = corpus_facts(recipe, corpus)
        size = model_size(recipe.model, facts)

        def parts(rows: int) -> tuple[MemoryPart, ...]:
            batch = Batch(rows, shape.row_tokens, shape.bf16, shape.on_gpu)
            if isinstance(recipe.data, DocumentData):
                batch = replace(batch, documents=True, sharing=shape.sharing)
            workers = recipe.cluster.workers
            return worker_memory(recipe.model, facts, recipe.train, batch, workers=workers)

        rows, most = recipe.train.micro_batch_rows, max(1, shape.rows_per_worker[1])
        if rows == "auto":
            one, two = (sum(part.bytes for part in parts(n)) for n in (1, 2))
            rows = auto_micro_batch_rows(
                most,
                shape.row_tokens,
                row_bytes=two - one,
                room_bytes=_room(recipe, has, on_gpu=shape.on_gpu) - (2 * one - two),
                on_gpu=shape.on_gpu,
            )
        rows = min(rows, most)
        return cls(size.parameters, size.flops_per_token, parts(rows), rows)


def _room(recipe: Recipe, has: Resources, *, on_gpu: bool) -> int:
    """Return the memory that one worker may fill: most of its GPU, or half its share of memory."""
    if on_gpu:
        return int(0.8 * (has.gpu_memory_bytes or _USUAL_GPU_BYTES))
    return int(0.5 * has.memory_bytes / max(1, recipe.cluster.workers))


def corpus_facts(recipe: Recipe, corpus: Corpus | None) -> CorpusFacts:
    """Return what a model takes from the corpus, from the recipe where it is not prepared."""
    length, tokenizer = recipe.data.sequence_length, recipe.corpus.tokenizer
    if corpus is not None:
        info = corpus.manifest.tokenizer
        return CorpusFacts(info.vocab_size, info.eos_id, length)
    if isinstance(tokenizer, ByteTokenizer):
        return CorpusFacts(257, 256, length)
    if isinstance(tokenizer, TrainedTokenizer):
        return CorpusFacts(tokenizer.vocab_size, 0, length)
    return _pretrained_facts(tokenizer, length)


def _pretrained_facts(tokenizer: PretrainedTokenizer, length: int) -> CorpusFacts:
    from raymix.corpus.tokenizers.tokenizer import load_pretrained

    info = load_pretrained(tokenizer).info
    return CorpusFacts(info.vocab_size, info.eos_id, length)


def _domain_plans(
    recipe: Recipe, supply: Sequence[DomainSizes], found: Forecast
) -> Iterator[DomainPlan]:
    caps = max_epochs_by_domain(recipe, supply)
    for at, domain in enumerate(supply):
        capped = found.capped_D[at]
        yield DomainPlan(
            supply=domain,
            share=float(found.asked_D[at]),
            read=round(found.read_D[at]),
            epochs=float(found.read_D[at]) / domain.usable,
            max_epochs=caps[at],
            capped_at=None if np.isinf(capped) else int(capped),
        )


def _cache_bytes(recipe: Recipe, has: Resources) -> int:
    if recipe.cluster.workers == 0:
        return 0
    asked = recipe.data.cache_bytes
    return int(AUTO_CACHE_SHARE * has.object_store_bytes) if asked == "auto" else asked


def _notes(
    recipe: Recipe, supply: Sequence[DomainSizes], found: Forecast, shape: _BatchShape
) -> Iterator[str]:
    """Yield what works but may not be what was meant."""
    length = recipe.data.sequence_length
    for at, domain in enumerate(supply):
        epochs = found.read_D[at] / domain.usable
        if np.isfinite(found.capped_D[at]) and found.capped_D[at] < shape.steps:
            step = int(found.capped_D[at])
            yield f"{domain.name} reaches its max_epochs at step {step:,}; the others take over."
        elif epochs > _MANY_EPOCHS:
            yield f"{domain.name} is read {epochs:.1f} times; data.max_epochs would cap that."
        if domain.dropped > _MUCH_DROPPED * domain.tokens:
            packed = isinstance(recipe.data, PackedData)
            why = "do not fill rows" if packed else "are beyond the longest document"
            yield (
                f"{domain.dropped:,} of {domain.tokens:,} tokens of {domain.name} are never read: "
                f"they {why} of {length:,} tokens."
            )
        if domain.valid_tokens < length:
            yield f"{domain.name} has less than a row of held-out text: its held-out loss is rough."
    if isinstance(recipe.mixer, ScheduleMixer):
        for number, piece in enumerate(recipe.mixer.pieces):
            if piece.step >= shape.steps:
                yield f"mixer.pieces.{number} starts at step {piece.step:,}, after the last step."
