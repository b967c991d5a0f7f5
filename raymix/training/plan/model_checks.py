"""Checks of the model that need no weights: on a small new model of the same configuration.

Whether packed documents see each other, and whether the gradient probe can split a model's
gradients, follows from the architecture. A model with fewer layers, a small vocabulary and, if it
is still large, narrow layers tells it in a second, before Ray is started or weights are read.
Training checks the real model again, which also serves configurations that cannot be made small.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from raymix.errors import RaymixError, RecipeError
from raymix.mixers import GRADIENT_STATISTICS
from raymix.recipe import Recipe
from raymix.recipe.lora import LoraConfig
from raymix.signals import GradientProbe
from raymix.signals.survey import notice
from raymix.training.host.device import quiet_libraries
from raymix.training.model.hf_model import (
    CorpusFacts,
    isolation_error,
    model_from_config,
    probe_model,
    resolve_config,
)
from raymix.training.model.lora import add_lora
from raymix.training.model.loss import PackedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Made and run in well under a second.
_MAX_PARAMETERS = 30_000_000
_VOCAB = 128
_MAX_LAYERS = 2
# Jamba and its like have one attention layer in eight, and say so by such a field.
_PERIOD, _PERIOD_LAYERS = "attn_layer_period", 8
_HEADS = 4
_NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "attention_hidden_size": 64,
    "num_attention_heads": _HEADS,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_ROWS, _LENGTH = 4, 16


@dataclass(frozen=True, slots=True)
class _Findings:
    """What a small model showed; a message per problem."""

    isolates: bool
    probe_error: str | None
    notes: tuple[str, ...]


def model_notes(recipe: Recipe, facts: CorpusFacts, needs: frozenset[str]) -> tuple[str, ...]:
    """Return what a user should know about the model, if it can do what the run needs.

    Args:
        recipe: The recipe.
        facts: The model's inputs from the corpus.
        needs: Statistics that the mixer reads.

    Raises:
        RecipeError: If packed documents would see each other, or the gradient probe cannot work.
    """
    config = resolve_config(recipe.model, facts)
    mode = recipe.train.probe.mode if GRADIENT_STATISTICS & needs else None
    findings = _findings(_Key(config, recipe.model.lora, mode))
    if findings is None:
        return ()
    if not findings.isolates:
        raise isolation_error(config.model_type)
    if findings.probe_error is not None:
        raise RecipeError.at(
            "train.probe.mode",
            mode,
            f"{recipe.mixer.kind} needs gradients that the probe cannot measure: "
            f"{findings.probe_error}",
            allowed="Allowed: exact, backward, last_layer",
            fix="Take another mode, model or mixer",
        )
    return findings.notes


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
    for config in _small_configs(key.config):
        # A configuration whose fields hang together otherwise fails to be built or run.
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = model_from_config(config)
            traits = probe_model(model)
        except Exception:  # noqa: BLE001 - of any type; the next one may work
            continue
        if key.mode is None or not traits.isolates_documents:
            return _Findings(traits.isolates_documents, None, ())
        error, notes = _try_probe(model, key, linear_head=traits.linear_head)
        return _Findings(True, error, notes)
    return None


def _small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield copies of a configuration that are cheap to build, the most faithful first."""
    for narrow in (False, True):
        small: Any = copy.deepcopy(config)
        small.vocab_size = min(small.vocab_size, _VOCAB)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(getattr(small, token, None), int):
                setattr(small, token, small.vocab_size - 1)
        try:
            _cut_layers(small)
            if narrow:
                _narrow(small)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model_from_config(small).parameters())
        except Exception:  # noqa: BLE001 - of any type; the next one may work
            continue
        if parameters <= _MAX_PARAMETERS:
            yield small


def _cut_layers(config: Any) -> None:
    # A property follows from the other fields, and has no setter.
    types = None if _is_property(config, "layer_types") else getattr(config, "layer_types", None)
    most = _PERIOD_LAYERS if hasattr(config, _PERIOD) else _MAX_LAYERS
    layers = min(config.num_hidden_layers, most)
    if types:
        # Each type that occurs, and as many layers as there are types.
        config.layer_types = list(dict.fromkeys([*types]))[: config.num_hidden_layers]
        config.layer_types += types[len(config.layer_types) : layers]
        layers = len(config.layer_types)
    config.num_hidden_layers = layers


def _narrow(config: Any) -> None:
    heads = getattr(config, "num_attention_heads", None)
    for name, width in _NARROW.items():
        if isinstance(getattr(config, name, None), int) and not _is_property(config, name):
            setattr(config, name, width)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(groups := getattr(config, name, None), int):
            setattr(config, name, {heads: _HEADS, 1: 1}.get(groups, 2))
    # State-space models derive these when a configuration is made, not when it is read.
    if isinstance(expand := getattr(config, "expand", None), int):
        config.intermediate_size = expand * config.hidden_size
        if isinstance(getattr(config, "num_heads", None), int):
            config.num_heads = config.intermediate_size // config.head_dim


def _is_property(config: Any, name: str) -> bool:
    return isinstance(getattr(type(config), name, None), property)


def _try_probe(
    model: PreTrainedModel, key: _Key, *, linear_head: bool
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
        loss = PackedLoss(add_lora(model, key.lora, seed=0), linear_head=linear_head)
        probe = GradientProbe(loss, n_groups=_ROWS // 2, mode=mode)
        probe.measure(tokens_BL, positions_BL, tokens_BL, torch.arange(_ROWS))
    except (RaymixError, ValueError) as error:
        # Of the message of a parameter only the problem: paths there are those of the library.
        return str(error).split(": ", 1)[-1].splitlines()[0].rstrip("."), ()
    finally:
        log.setLevel(level)
    names = probe.by_backward
    return None, ((notice(names).replace("probe:", "probe takes", 1) + ".",) if names else ())
