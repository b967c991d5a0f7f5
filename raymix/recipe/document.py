"""The recipe: one document from which every stage of a run follows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from raymix.recipe.base import Fault, Faults, Integer, RecipeModel, raise_if
from raymix.recipe.corpus import NAME, CorpusConfig
from raymix.recipe.mixer import MixerConfig, ProportionalMixer
from raymix.recipe.rules import broken_rules
from raymix.recipe.sections.cluster import ClusterConfig
from raymix.recipe.sections.specialists import SpecialistsConfig
from raymix.recipe.sections.tune import TuneConfig
from raymix.recipe.training import (
    ConfigModel,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PackedData,
    RunConfig,
    TrainConfig,
)


class Recipe(RecipeModel):
    """Everything a run depends on."""

    extends: str | None = Field(default=None, exclude=True)
    """A recipe file that this one starts from, from this file's directory on; what is written here
    is laid over it."""
    name: Annotated[str, NAME] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)
    """Name of the run."""
    seed: Integer = Field(default=0, ge=0, lt=2**63)
    """Seeds the data order and the initial weights."""
    corpus: CorpusConfig
    """Sources, tokenizer, and the prepared corpus."""
    data: DataConfig = PackedData()
    """How tokens become batches."""
    mixer: MixerConfig = ProportionalMixer()
    """What decides the shares of the domains."""
    model: ModelConfig = ConfigModel()
    """The model to train."""
    train: TrainConfig
    """The optimizer loop."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and resources."""
    run: RunConfig = RunConfig()
    """The run directory."""
    tune: TuneConfig = TuneConfig()
    """How `raymix tune` looks for the best shares; other commands pass it over."""
    specialists: SpecialistsConfig = SpecialistsConfig()
    """What `raymix specialists` fine-tunes and merges; other commands pass it over."""

    @property
    def run_dir(self) -> str:
        """Return the run directory with the name and the seed filled in."""
        # The seed in the path keeps runs that differ in it alone apart.
        return self.run.dir.format(name=self.name, seed=self.seed)

    @field_validator("extends")
    @classmethod
    def _only_in_files(cls, value: str | None) -> None:
        # The loader takes the key out of a file's data before it validates them.
        if value is not None:
            wrong = "only a file can extend another"
            raise Faults(Fault("", value, wrong, ("Write it into the recipe's file",)))

    @model_validator(mode="after")
    def _rules(self) -> Recipe:
        # Last: rules over several sections need each of them to be valid.
        raise_if(*broken_rules({name: getattr(self, name) for name in type(self).model_fields}))
        return self
