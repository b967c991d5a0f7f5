"""Checks of a loader's options, ranks and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymix.errors import CorpusError, RecipeError, TrainingError
from raymix.loader.collectives import Collectives
from raymix.loader.tensors import Layout
from raymix.mixers import Mixer
from raymix.recipe import Recipe
from raymix.store import Corpus

STATE_VERSION = 1
"""Of the form of a loader's state."""


def check_options(micro_batches: int, layout: Layout, *, varlen: bool) -> None:
    """Raise RecipeError for options that are wrong or do not go together."""
    if micro_batches < 1:
        raise RecipeError.at("micro_batches", micro_batches, "not a number of parts, 1 and more")
    if layout not in ("rows", "flat"):
        raise RecipeError.at("layout", layout, "not a layout", allowed="Allowed: rows, flat")
    if varlen and layout != "flat":
        raise RecipeError.at(
            "varlen",
            varlen,
            "boundaries of documents are of one row of all tokens",
            fix="Use layout='flat' as well",
        )


def check_state(state: Mapping[str, Any], recipe: Recipe, corpus: Corpus) -> None:
    """Raise where a state is not that of a loader of this recipe and corpus.

    Raises:
        TrainingError: If it is of another seed or batch size, or no state of a loader.
        CorpusError: If it is of another corpus.
    """
    if state.get("version") != STATE_VERSION:
        raise TrainingError.at(
            "state.version", state.get("version"), "not the state of a loader of this version"
        )
    own = {"seed": recipe.seed, "step_tokens": recipe.data.step_tokens}
    for name, value in own.items():
        if state[name] != value:
            raise TrainingError.at(
                f"state.{name}",
                state[name],
                f"this loader's recipe has {value}",
                fix="Use the recipe that the state was made with",
            )
    fingerprint = state["sampler"]["fingerprint"]
    if fingerprint != corpus.fingerprint and not recipe.data.accept_changed_corpus:
        raise CorpusError.at(
            "state.sampler.fingerprint",
            fingerprint,
            f"the state is of another corpus than {recipe.corpus.path}",
            fix="Restore that corpus, or set data.accept_changed_corpus",
        )


def check_seek(step: int, steps: int, mixer: Mixer) -> None:
    """Raise TrainingError for a step that cannot be found without a state."""
    if not 0 <= step <= steps:
        raise TrainingError.at("step", step, f"not a step of this run: 0 to {steps}")
    if step and mixer.needs:
        raise TrainingError.at(
            "step",
            step,
            "under an adaptive mixer the batches follow from losses, not from the step alone",
            fix="Save state_dict() with the checkpoint, and load it",
        )


def check_ranks(ranks: Collectives, fingerprint: str, step: int) -> None:
    """Raise TrainingError where two processes read as one rank, or read different things.

    A collective, if the ranks have a process group.
    """
    if not ranks.connected:
        return
    everyone = ranks.gather((ranks.rank, fingerprint, step))
    numbers = [rank for rank, *_ in everyone]
    if numbers != list(range(ranks.world_size)):
        raise TrainingError.at(
            "rank",
            ranks.rank,
            f"the processes read as ranks {', '.join(map(str, numbers))}",
            fix="Give each process its own rank, in the order of the process group",
        )
    if len({tuple(rest) for _, *rest in everyone}) > 1:
        raise TrainingError.at(
            "rank",
            ranks.rank,
            "the ranks read different corpora, or from different steps on",
            fix="Load the same state on all of them",
        )
