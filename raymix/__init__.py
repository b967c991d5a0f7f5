"""raymix decides what a language model reads next.

Everything public is reachable from here and imported when it is first used, so `import raymix`
loads neither torch nor ray:

    recipe = raymix.load_recipe("my.yaml", ["train.steps=200"])
    raymix.plan(recipe).document()     # what would happen
    raymix.prepare(recipe.corpus)      # text to token blocks
    raymix.train(recipe)               # stream, train, checkpoint, report

Rooms: `raymix.recipe`, `raymix.store`, `raymix.sampling`, `raymix.mixers`, `raymix.schedule`,
`raymix.corpus`, `raymix.control`, `raymix.train`, `raymix.report`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymix.corpus import prepare
    from raymix.errors import (
        ClusterError,
        CorpusError,
        RaymixError,
        RecipeError,
        ScheduleError,
        TrainingError,
    )
    from raymix.mixers import DomainStats, Mixer, MixerContext, build_mixer, mixer
    from raymix.recipe import Recipe, load_recipe, recipe_schema, recipe_to_yaml
    from raymix.sampling import MixtureLog
    from raymix.schedule import plan_batch
    from raymix.store import Corpus
    from raymix.train.api import train
    from raymix.train.preflight import plan_run as plan

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "Corpus",
    "CorpusError",
    "DomainStats",
    "Mixer",
    "MixerContext",
    "MixtureLog",
    "RaymixError",
    "Recipe",
    "RecipeError",
    "ScheduleError",
    "TrainingError",
    "build_mixer",
    "load_recipe",
    "mixer",
    "plan",
    "plan_batch",
    "prepare",
    "recipe_schema",
    "recipe_to_yaml",
    "train",
]

_HOMES = {
    "errors": (
        "ClusterError",
        "CorpusError",
        "RaymixError",
        "RecipeError",
        "ScheduleError",
        "TrainingError",
    ),
    "mixers": ("DomainStats", "Mixer", "MixerContext", "build_mixer", "mixer"),
    "recipe": ("Recipe", "load_recipe", "recipe_schema", "recipe_to_yaml"),
    "sampling": ("MixtureLog",),
    "schedule": ("plan_batch",),
    "store": ("Corpus",),
    "corpus": ("prepare",),
}
_ROOMS = (
    "recipe", "store", "sampling", "mixers", "schedule", "corpus", "control", "train", "report",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return a public name, importing its room on first use."""
    if name in _ROOMS:  # `raymix.train` is a room that can be called
        return importlib.import_module(f"raymix.{name}")
    if name == "plan":
        return importlib.import_module("raymix.train.preflight").plan_run
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"raymix.{home}"), name)
    raise AttributeError(f"module 'raymix' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*__all__, *_ROOMS, "__version__"})
