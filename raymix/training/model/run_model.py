"""The model of a run: as it starts, or with the weights of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raymix.recipe import ModelConfig, PretrainedModel, Recipe
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.lora import LoraBase, add_lora, load_adapter
from raymix.training.run.pinned_model import pretrained_repo

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_model(recipe: Recipe, facts: CorpusFacts, checkpoint: Path | None) -> PreTrainedModel:
    """Return a run's model with the weights of a checkpoint, or those it starts from.

    Raises:
        RaymixError: If model or checkpoint cannot be used.
    """
    config, lora = recipe.model, recipe.model.lora
    if lora is None:
        if checkpoint is not None:
            config = PretrainedModel(kind="pretrained", path=str(checkpoint))
        return build_model(config, facts, seed=recipe.seed)
    # Checkpoints hold the adapters alone, the weights below them are those of the start.
    model = build_model(config, facts, seed=recipe.seed)
    add_lora(model, lora, seed=recipe.seed, base=_base(config))
    if checkpoint is not None:
        load_adapter(model, checkpoint)
    return model.train()


def _base(config: ModelConfig) -> LoraBase | None:
    """Return where the weights below the adapters are, as peft's readers look for them."""
    if not isinstance(config, PretrainedModel):
        return None
    repo = pretrained_repo(config)
    return LoraBase(config.path) if repo is None else LoraBase(repo.name, repo.revision)


def checkpoint_facts(recipe: Recipe, checkpoint: Path) -> CorpusFacts:
    """Return what the model of a run takes from its corpus, read from a checkpoint instead."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    return CorpusFacts(config.vocab_size, config.eos_token_id, recipe.data.sequence_length)
