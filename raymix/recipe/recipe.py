"""The recipe: one document from which every stage of a run follows."""

from __future__ import annotations

from pydantic import Field

from raymix.recipe._base import Model
from raymix.recipe.corpus import CorpusConfig
from raymix.recipe.mixer import MixerConfig, ProportionalMixer
from raymix.recipe.training import (
    ClusterConfig,
    ConfigModel,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PackedData,
    RunConfig,
    TrainConfig,
)


class Recipe(Model):
    """Everything a run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)
    """Name of the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds the data order and the initial weights."""
    corpus: CorpusConfig
    """Sources, tokenizer, and the prepared corpus."""
    data: DataConfig = PackedData()
    """How tokens become batches."""
    mixer: MixerConfig = ProportionalMixer()
    """What decides the shares of the domains."""
    model: ModelConfig = ConfigModel()
    """The model to train."""
    train: TrainConfig = TrainConfig()
    """The optimiser loop."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and resources."""
    run: RunConfig = RunConfig()
    """The run directory."""
