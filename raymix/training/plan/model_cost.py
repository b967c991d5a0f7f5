"""Size, arithmetic and memory of a recipe's model; measured once, and read from a cache after.

To measure takes torch and the architecture's module of transformers, whose imports alone take
seconds. So the measurements are in a module of their own, imported when they are needed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from raymix._utils.imports import collection_paused
from raymix._utils.result_cache import cached
from raymix.recipe import DocumentData, ModelConfig, PretrainedModel, Recipe, TrainConfig
from raymix.store.remote.hub import fetch_config
from raymix.training.host.machine import Resources, has_gpu_driver
from raymix.training.model.facts import CorpusFacts, MemoryPart
from raymix.training.plan.batch_shape import BatchShape
from raymix.training.run.pinned_model import pretrained_repo

# Assumed where the workers' GPUs are on other machines: the smallest in common use (T4), so a plan
# fits on larger ones, too.
_ASSUMED_GPU_BYTES = 16 * 10**9
# Parts of the memory that a worker may fill; the rest is for fragmentation on a GPU, and on a CPU
# for Ray's object store and page cache.
_GPU_MEMORY_FRACTION, _CPU_MEMORY_FRACTION = 0.8, 0.5
# Fields of `train` without a part in the cost. Taken away before it is measured, so that it cannot
# depend on them.
_WITHOUT_COST = (
    "steps", "tokens", "lr", "min_lr_ratio", "schedule", "warmup_ratio", "decay_ratio", "clip_norm",
    "max_skipped_steps", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
    "probe_interval",
)  # fmt: skip
MODEL_LIBRARIES = (
    "torch", "transformers", "peft", "kernels", "flash-attn", "mamba-ssm", "causal-conv1d",
    "flash-linear-attention",
)  # fmt: skip
"""Distributions whose version decides what a model is; architectures take other paths with the last
ones, where they are installed."""


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Size, arithmetic and memory of a model."""

    parameters: int
    trainable: int
    """Parameters that are trained."""
    flops_per_token: float
    parts: tuple[MemoryPart, ...]
    micro_batch_rows: int
    checkpoint_bytes: int
    decays_weights: bool
    """Whether the optimizer applies `train.weight_decay`."""


@dataclass(frozen=True, slots=True)
class CostInputs:
    """All that the cost of a model depends on."""

    model: ModelConfig
    train: TrainConfig
    facts: CorpusFacts
    shape: BatchShape
    documents: bool
    """Whether rows are sequences of documents."""
    workers: int
    capacity_bytes: int
    """Memory that one worker may fill."""


def model_cost(
    recipe: Recipe, facts: CorpusFacts, shape: BatchShape, available: Resources
) -> ModelCost:
    """Return the cost of a recipe's model.

    Args:
        recipe: The recipe.
        facts: The model's inputs from the corpus.
        shape: The run's batches.
        available: Resources of the machine or cluster.

    Raises:
        RecipeError: If the model or the optimizer cannot be made.
        StorageError: If the model is on the Hub, which cannot be reached.
    """
    fields = TrainConfig.model_fields
    same = {name: fields[name].default for name in _WITHOUT_COST}
    inputs = CostInputs(
        model=recipe.model,
        train=recipe.train.model_copy(update=same),
        facts=facts,
        shape=replace(shape, steps=0, tokens=0, rows=0),
        documents=isinstance(recipe.data, DocumentData),
        workers=recipe.cluster.workers,
        capacity_bytes=_worker_capacity(recipe, available, on_gpu=shape.on_gpu),
    )

    def measure() -> ModelCost:
        # Building the model imports most of transformers.
        with collection_paused():
            from raymix.training.plan.cost_measurement import measure_cost

            return measure_cost(inputs)

    # The source of an optimizer of the user's own may change.
    if ":" in recipe.train.optimizer:
        return measure()
    text = TypeAdapter(CostInputs).dump_json(inputs).decode()
    key = ("model cost", text, config_text(recipe.model), f"GPU {has_gpu_driver()}")
    return cached(key, measure, ModelCost, MODEL_LIBRARIES)


def config_text(model: ModelConfig) -> str:
    """Return the `config.json` of a checkpoint; nothing of a new model.

    Raises:
        StorageError: If it is on the Hub, which cannot be reached.
    """
    if not isinstance(model, PretrainedModel):
        return ""
    repo = pretrained_repo(model)
    path = Path(model.path) / "config.json" if repo is None else fetch_config(repo)
    # A file that is missing or no text is an error of whoever loads it.
    with suppress(OSError, ValueError):
        return path.read_text("utf-8")
    return ""


def _worker_capacity(recipe: Recipe, available: Resources, *, on_gpu: bool) -> int:
    if on_gpu:
        return int(_GPU_MEMORY_FRACTION * (available.gpu_memory_bytes or _ASSUMED_GPU_BYTES))
    return int(_CPU_MEMORY_FRACTION * available.memory_bytes / max(1, recipe.cluster.workers))
