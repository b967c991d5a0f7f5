"""Recipes: the models, reading and writing them, their JSON schema.

A recipe is one YAML file that maps one to one onto the frozen models exported here; `Recipe` is
the whole. `load_recipe` reads it, applies overrides and reports every fault at once.
"""

from raymix.recipe.corpus import (
    ByteTokenizer,
    CorpusConfig,
    DomainConfig,
    PretrainedTokenizer,
    TokenizerConfig,
    TrainedTokenizer,
)
from raymix.recipe.document import Recipe
from raymix.recipe.load import (
    RecipeSource,
    load_recipe,
    read_recipe,
    recipe_files,
    recipe_to_yaml,
    resolve_paths,
)
from raymix.recipe.mixer import (
    AdoMixer,
    AioliMixer,
    DgaMixer,
    DogeMixer,
    DoremiMixer,
    EpochsMixer,
    ImportanceMixer,
    InheritMixer,
    MixerConfig,
    OdmMixer,
    PikeMixer,
    PluginMixer,
    ProportionalMixer,
    RbMixer,
    ReplayMixer,
    ScheduleMixer,
    SchedulePiece,
    StaticMixer,
    TemperatureMixer,
    UniformMixer,
    UnimaxMixer,
)
from raymix.recipe.schema import commented_recipe, recipe_schema
from raymix.recipe.sections.cluster import ClusterConfig
from raymix.recipe.sections.specialists import SpecialistsConfig
from raymix.recipe.sections.tune import TuneConfig
from raymix.recipe.training import (
    ConfigModel,
    DataConfig,
    DocumentData,
    EvalConfig,
    ModelConfig,
    PackedData,
    PretrainedModel,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AdoMixer",
    "AioliMixer",
    "ByteTokenizer",
    "ClusterConfig",
    "ConfigModel",
    "CorpusConfig",
    "DataConfig",
    "DgaMixer",
    "DocumentData",
    "DogeMixer",
    "DomainConfig",
    "DoremiMixer",
    "EpochsMixer",
    "EvalConfig",
    "ImportanceMixer",
    "InheritMixer",
    "MixerConfig",
    "ModelConfig",
    "OdmMixer",
    "PackedData",
    "PikeMixer",
    "PluginMixer",
    "PretrainedModel",
    "PretrainedTokenizer",
    "ProportionalMixer",
    "RbMixer",
    "Recipe",
    "RecipeSource",
    "ReplayMixer",
    "RunConfig",
    "ScheduleMixer",
    "SchedulePiece",
    "SpecialistsConfig",
    "StaticMixer",
    "TemperatureMixer",
    "TokenizerConfig",
    "TrainConfig",
    "TrainedTokenizer",
    "TuneConfig",
    "UniformMixer",
    "UnimaxMixer",
    "commented_recipe",
    "load_recipe",
    "read_recipe",
    "recipe_files",
    "recipe_schema",
    "recipe_to_yaml",
    "resolve_paths",
]
