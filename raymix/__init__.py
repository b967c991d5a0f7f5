"""raymix decides what a language model reads next.

Everything public is reachable from here and imported when it is first used, so `import raymix`
loads neither torch nor ray:

    recipe = raymix.load_recipe("my.yaml", ["train.steps=200"])
    raymix.plan(recipe).document()     # what would happen
    raymix.prepare(recipe.corpus)      # text to token blocks
    raymix.train(recipe)               # stream, train, checkpoint, report
    raymix.tune(recipe)                # small runs, a law, the best shares, tried
    raymix.fit_law("mixtures.csv")     # a law that predicts losses from shares, and its report
    raymix.merge("merge.yaml", "out")  # one model from several

Rooms: `raymix.recipe`, `raymix.store`, `raymix.sampling`, `raymix.mixers`, `raymix.laws`,
`raymix.schedule`, `raymix.merge`, `raymix.corpus`, `raymix.control`, `raymix.train`,
`raymix.tune`, `raymix.cluster_jobs`, `raymix.report`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymix.corpus import prepare
    from raymix.errors import (
        ClusterError,
        CorpusError,
        LawError,
        MergeError,
        RaymixError,
        RecipeError,
        ScheduleError,
        TrainingError,
    )
    from raymix.laws import MixtureTable, fit_law
    from raymix.merge import merge, merge_method
    from raymix.mixers import DomainStats, Mixer, MixerContext, build_mixer, mixer
    from raymix.recipe import Recipe, load_recipe, recipe_schema, recipe_to_yaml
    from raymix.sampling import MixtureLog
    from raymix.schedule import plan_batch
    from raymix.store import Corpus
    from raymix.train.api import train
    from raymix.train.preflight import plan_run as plan
    from raymix.tune.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "Corpus",
    "CorpusError",
    "DomainStats",
    "LawError",
    "MergeError",
    "Mixer",
    "MixerContext",
    "MixtureLog",
    "MixtureTable",
    "RaymixError",
    "Recipe",
    "RecipeError",
    "ScheduleError",
    "TrainingError",
    "build_mixer",
    "fit_law",
    "load_recipe",
    "merge",
    "merge_method",
    "mixer",
    "plan",
    "plan_batch",
    "prepare",
    "recipe_schema",
    "recipe_to_yaml",
    "train",
    "tune",
]

_HOMES = {
    "errors": (
        "ClusterError",
        "CorpusError",
        "LawError",
        "MergeError",
        "RaymixError",
        "RecipeError",
        "ScheduleError",
        "TrainingError",
    ),
    "laws": ("MixtureTable", "fit_law"),
    "merge": ("merge_method",),
    "mixers": ("DomainStats", "Mixer", "MixerContext", "build_mixer", "mixer"),
    "recipe": ("Recipe", "load_recipe", "recipe_schema", "recipe_to_yaml"),
    "sampling": ("MixtureLog",),
    "schedule": ("plan_batch",),
    "store": ("Corpus",),
    "corpus": ("prepare",),
}
_ROOMS = (
    "recipe",
    "store",
    "sampling",
    "mixers",
    "laws",
    "schedule",
    "merge",
    "corpus",
    "control",
    "train",
    "tune",
    "cluster_jobs",
    "report",
)


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
