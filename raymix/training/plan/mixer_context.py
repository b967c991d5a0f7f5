"""The run as mixers see it, and its number of steps."""

from __future__ import annotations

import numpy as np

from raymix.mixers import MixerContext
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.streaming.blocks.geometry import empty_domains
from raymix.training.plan.target_counts import target_domain_counts


def count_steps(recipe: Recipe) -> int:
    """Return the optimizer steps of a run; `train.tokens` is rounded up to whole steps."""
    train = recipe.train
    return train.steps or -(-(train.tokens or 0) // recipe.data.step_tokens)


def mixer_context(recipe: Recipe, corpus: Corpus, *, steps: int) -> MixerContext:
    """Return what a mixer may know about the run."""
    tokens = [corpus.split(name, "train").tokens for name in corpus.domain_names]
    return MixerContext(
        domains=corpus.domain_names,
        tokens_D=np.array(tokens, dtype=np.int64),
        total_tokens=steps * recipe.data.step_tokens,
        total_steps=steps,
        rows_per_step=recipe.data.step_rows,
        targets=recipe.mixer.targets,
        nearest_D=target_domain_counts(recipe, corpus),
        empty=empty_domains(corpus, recipe.data),
    )
