"""raymix decides what a language model reads next.

Everything public is reachable from here and imported on first use, so `import raymix` loads
neither torch nor ray:

    recipe = raymix.load_recipe("my.yaml", ["train.steps=200"])
    raymix.plan(recipe).document()     # dry run: tokens, shares, epochs, memory
    raymix.prepare(recipe.corpus)      # text to token blocks
    raymix.train(recipe)               # stream, train, checkpoint, report
    raymix.connect("runs/my").set_weights({"books": 1.0})  # change the shares while it trains
    raymix.MixtureLoader(recipe)       # the same batches in a training loop of one's own
    raymix.tune(recipe)                # proxy runs, a mixing law, its optimum, verified
    raymix.fit_law("mixtures.csv")     # a law that predicts losses from shares, and its report
    raymix.merge("merge.yaml", "out")  # one model from several

Packages, from the lowest floor to the highest (docs/architecture.md): `recipe`, `store`,
`sampling`, `mixers`, `laws`, `schedule`, `signals`, `merging`, `context_parallel`, `report`,
`corpus`, `streaming`, `training`, `loader`, `tuning`, `jobs`, `cli`.
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
    from raymix.loader import MixtureLoader, token_losses
    from raymix.merging import merge, merge_method
    from raymix.mixers import DomainStats, Mixer, MixerContext, build_mixer, mixer
    from raymix.recipe import Recipe, load_recipe, recipe_schema, recipe_to_yaml
    from raymix.sampling import MixtureLog
    from raymix.schedule import plan_batch
    from raymix.store import Corpus
    from raymix.training.api import train
    from raymix.training.plan.preflight import plan_run as plan
    from raymix.training.run.control import connect
    from raymix.tuning.mixtures.tune import tune

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
    "MixtureLoader",
    "MixtureLog",
    "MixtureTable",
    "RaymixError",
    "Recipe",
    "RecipeError",
    "ScheduleError",
    "TrainingError",
    "build_mixer",
    "connect",
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
    "token_losses",
    "train",
    "tune",
]

# Where each public name is defined; read by `__getattr__` so that importing raymix stays cheap.
_MODULE_OF = {
    "ClusterError": "errors",
    "Corpus": "store",
    "CorpusError": "errors",
    "DomainStats": "mixers",
    "LawError": "errors",
    "MergeError": "errors",
    "Mixer": "mixers",
    "MixerContext": "mixers",
    "MixtureLoader": "loader",
    "MixtureLog": "sampling",
    "MixtureTable": "laws",
    "RaymixError": "errors",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "ScheduleError": "errors",
    "TrainingError": "errors",
    "build_mixer": "mixers",
    "connect": "training.run.control",
    "fit_law": "laws",
    "load_recipe": "recipe",
    "merge": "merging",
    "merge_method": "merging",
    "mixer": "mixers",
    "plan": "training.plan.preflight",
    "plan_batch": "schedule",
    "prepare": "corpus",
    "recipe_schema": "recipe",
    "recipe_to_yaml": "recipe",
    "token_losses": "loader",
    "train": "training.api",
    "tune": "tuning.mixtures.tune",
}
_PACKAGES = (
    "context_parallel",
    "corpus",
    "jobs",
    "laws",
    "loader",
    "merging",
    "mixers",
    "recipe",
    "report",
    "sampling",
    "schedule",
    "signals",
    "store",
    "streaming",
    "training",
    "tuning",
)


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module on first use."""
    if name in _PACKAGES:
        return importlib.import_module(f"raymix.{name}")
    if name in _MODULE_OF:
        module = importlib.import_module(f"raymix.{_MODULE_OF[name]}")
        return getattr(module, "plan_run" if name == "plan" else name)
    raise AttributeError(f"module 'raymix' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*__all__, *_PACKAGES, "__version__"})
