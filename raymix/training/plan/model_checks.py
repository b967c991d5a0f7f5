"""Checks of the model that need no weights: on a small new model of the same configuration.

Whether packed documents see each other, and whether the gradient probe can split a model's
gradients, follows from the architecture: a small model of it tells before Ray is started or weights
are read. Training checks the real model again, which also serves configurations that cannot be made
small.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from raymix.errors import RaymixError, RecipeError
from raymix.mixers import GRADIENT_STATISTICS
from raymix.recipe import DocumentData, Recipe
from raymix.recipe.sections.lora import LoraConfig
from raymix.signals import GradientProbe
from raymix.signals.survey import notice
from raymix.training.host.device import quiet_libraries
from raymix.training.model.hf_model import CorpusFacts, resolve_config
from raymix.training.model.lora import add_lora
from raymix.training.model.loss import PackedLoss
from raymix.training.model.traits import (
    ModelTraits,
    causality_error,
    isolation_error,
    probe_model,
)
from raymix.training.plan.small_model import small_models
from raymix.training.step.document_layout import check_unshared, context_parallel_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ROWS, _LENGTH = 4, 16


@dataclass(frozen=True, slots=True)
class _Findings:
    """What a small model showed; a message per problem."""

    traits: ModelTraits
    probe_error: str | None
    notes: tuple[str, ...]


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
    config = resolve_config(recipe.model, facts)
    mode = recipe.train.probe.mode if GRADIENT_STATISTICS & needs else None
    findings = _findings(_Key(config, recipe.model.lora, mode))
    if findings is None:
        return ()
    check_traits(findings.traits, recipe, needs, config.model_type)
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
        f"{config.model_type} cannot keep documents of one row apart, so each is a row of its own, "
        "padded to the longest of similar length."
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


class _Key:
    """The input of `_findings`, comparable: a configuration is not hashable, its JSON is."""

    def __init__(self, config: PreTrainedConfig, lora: LoraConfig | None, mode: str | None) -> None:
        self.config, self.lora, self.mode = config, lora, mode
        adapters = lora.model_dump_json() if lora is not None else ""
        self._text = f"{config.to_json_string(use_diff=False)}{adapters}{mode}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


# A comparison plans one run per mixer, all with the same model.
@lru_cache(maxsize=16)
def _findings(key: _Key) -> _Findings | None:
    """Return what a small model shows; None where the configuration cannot be made small."""
    quiet_libraries()
    threads = torch.get_num_threads()
    # Several threads wait for each other longer than the small products take.
    torch.set_num_threads(1)
    try:
        for model in small_models(key.config):
            # A configuration whose fields hang together in another way fails when it runs.
            try:
                traits = probe_model(model)
            except Exception:  # noqa: BLE001 - of any type; the next one may work
                continue
            if key.mode is None or not traits.isolates_documents:
                return _Findings(traits, None, ())
            error, notes = _try_probe(model, key, traits)
            return _Findings(traits, error, notes)
        return None
    finally:
        torch.set_num_threads(threads)


def _try_probe(
    model: PreTrainedModel, key: _Key, traits: ModelTraits
) -> tuple[str | None, tuple[str, ...]]:
    """Return why the gradient probe cannot measure a model, and what it does in another way."""
    mode: Any = key.mode
    tokens_BL = torch.arange(_ROWS * _LENGTH).view(_ROWS, _LENGTH) % model.config.vocab_size
    positions_BL = (torch.arange(_LENGTH) % (_LENGTH // 2)).expand_as(tokens_BL)
    log = logging.getLogger("raymix.signals")
    level = log.level
    # The plan says it in its notes.
    log.setLevel(logging.ERROR)
    try:
        adapted = add_lora(model, key.lora, seed=0)
        loss = PackedLoss(adapted, linear_head=traits.linear_head, isolation=traits.isolation)
        probe = GradientProbe(loss, n_groups=_ROWS // 2, mode=mode)
        probe.measure(tokens_BL, positions_BL, tokens_BL, torch.arange(_ROWS))
    except (RaymixError, ValueError) as error:
        # Of the message of a parameter only the problem: paths there are those of the library.
        return str(error).split(": ", 1)[-1].splitlines()[0].rstrip("."), ()
    finally:
        log.setLevel(level)
    names = probe.by_backward
    return None, ((notice(names).replace("probe:", "probe takes", 1) + ".",) if names else ())
