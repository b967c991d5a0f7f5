"""Checks of the model that need no weights: on a small new model of the same configuration.

Whether packed documents see each other, and whether the gradient probe can split a model's
gradients, follows from the architecture: a small model of it tells before Ray is started or weights
are read. Training checks the real model again, which also serves configurations that cannot be made
small.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter

from raymix._utils.result_cache import cached
from raymix.errors import RecipeError
from raymix.mixers import GRADIENT_STATISTICS
from raymix.recipe import DocumentData, ModelConfig, Recipe
from raymix.training.model.facts import (
    CorpusFacts,
    ModelTraits,
    causality_error,
    isolation_error,
)
from raymix.training.plan.model_cost import MODEL_LIBRARIES, config_text
from raymix.training.step.rank_layout import check_unshared, context_parallel_size


@dataclass(frozen=True, slots=True)
class TrialInputs:
    """All that the findings depend on."""

    model: ModelConfig
    facts: CorpusFacts
    mode: str | None
    """How the gradient probe is to measure; None where nothing is measured."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Properties that a small model showed."""

    model_type: str
    """The model's type in transformers."""
    traits: ModelTraits | None
    """None where the configuration cannot be made small."""
    probe_error: str | None = None
    """Why the gradient probe cannot measure it."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""


def model_notes(recipe: Recipe, facts: CorpusFacts, needs: frozenset[str]) -> tuple[str, ...]:
    """Return what a user should know about the model, if it can do what the run needs.

    Args:
        recipe: The recipe.
        facts: The model's inputs from the corpus.
        needs: Statistics that the mixer reads.

    Raises:
        RecipeError: If the model cannot keep documents apart as the recipe lays them out, sees
            what it is to predict, or cannot be measured by the gradient probe.
    """
    mode = recipe.train.probe.mode if GRADIENT_STATISTICS & needs else None
    findings = _find(TrialInputs(recipe.model, facts, mode))
    if findings.traits is None:
        return ()
    check_traits(findings.traits, recipe, needs, findings.model_type)
    if findings.probe_error is not None:
        raise RecipeError.at(
            "train.probe.mode",
            mode,
            f"{recipe.mixer.kind} needs gradients that the probe cannot measure: "
            f"{findings.probe_error}",
            allowed="Allowed: exact, backward, last_layer",
            fix="Take another mode, model or mixer",
        )
    if findings.traits.isolates_documents:
        return findings.notes
    alone = (
        f"{findings.model_type} cannot keep documents of one row apart, so each is a row of its "
        "own, padded to the longest of similar length."
    )
    return (*findings.notes, alone)


def check_traits(
    traits: ModelTraits, recipe: Recipe, needs: frozenset[str], model_type: str
) -> None:
    """Check that a model can do what the recipe and its mixer need.

    Args:
        traits: What the model showed.
        recipe: The recipe.
        needs: Statistics that the mixer reads.
        model_type: The model's type in transformers, for messages.

    Raises:
        RecipeError: If it cannot.
    """
    if not traits.causal:
        raise causality_error(model_type)
    data, workers = recipe.data, recipe.cluster.workers
    if isinstance(data, DocumentData) and traits.isolation != "positions":
        check_unshared(context_parallel_size(data, workers), model_type)
    if traits.isolates_documents:
        return
    if not isinstance(data, DocumentData):
        raise isolation_error(model_type)
    alone = f"documents of {model_type} are rows of their own"
    if recipe.train.parallel == "fsdp2" and workers > 1:
        raise RecipeError.at(
            "train.parallel",
            "fsdp2",
            f"{alone}, in as many passes as their lengths take, and all workers would need as many",
            fix="Set it to ddp",
        )
    if GRADIENT_STATISTICS & needs:
        raise RecipeError.at(
            "mixer.kind",
            recipe.mixer.kind,
            f"it needs gradients of packed rows, and {alone}",
            fix="Take another mixer, or a type such as llama, qwen3 or gpt2",
        )


def _find(inputs: TrialInputs) -> Findings:
    def try_model() -> Findings:
        from raymix.training.plan.small_model_trial import try_small_model

        return try_small_model(inputs)

    text = TypeAdapter(TrialInputs).dump_json(inputs).decode()
    key = ("small model", text, config_text(inputs.model))
    return cached(key, try_model, Findings, MODEL_LIBRARIES)
