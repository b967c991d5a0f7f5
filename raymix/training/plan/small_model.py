"""Small new models of an architecture, for what follows from it and not from its weights.

Fewer layers, a small vocabulary, narrow layers and weights of gain 1: made and run in well under a
second. Whether documents see each other hides in the small weights of a new model, and behind
windows and convolutions that are longer than the row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from raymix.training.model.hf_model import model_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Made and run in well under a second.
_MAX_PARAMETERS = 30_000_000
_VOCAB = 128
_MAX_LAYERS = 2
# Jamba and its like have one attention layer in eight, and say so by such a field.
_PERIOD, _PERIOD_LAYERS = "attn_layer_period", 8
# Shorter than the rows of `raymix.training.model.traits`.
_WINDOW = 4
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
_HIDDEN, _HEADS, _HEAD_DIM = 64, 4, 16
_NARROW = {
    "hidden_size": _HIDDEN,
    "intermediate_size": _HIDDEN,
    "moe_intermediate_size": 32,
    "attention_hidden_size": _HIDDEN,
    "num_attention_heads": _HEADS,
    "head_dim": _HEAD_DIM,
    "rotary_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
# Attention over a latent (DeepSeek), whose rotary part is what its configuration calls `head_dim`.
_LATENT = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
# State-space layers beside attention (Bamba, Falcon H1, Granite 4).
_STATE_SPACE = {"mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8}


def small_models(config: PreTrainedConfig) -> Iterator[PreTrainedModel]:
    """Yield new models of an architecture with weights of gain 1, the most faithful first.

    Fields that hang together in another way than these know make one that cannot be built, which
    is left out, or run, which shows where it is used.
    """
    for small in _small_configs(config):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = model_from_config(small)
                _set_unit_gain(model)
        except Exception:  # noqa: BLE001 - of any type; the next one may work
            continue
        yield model


@torch.no_grad()
def _set_unit_gain(model: PreTrainedModel) -> None:
    """Draw weights that neither damp nor amplify, and that gate nothing by being 0."""
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape)
        if parameter.ndim >= 2:
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
        else:
            # Norms stay about 1, biases about 0.
            parameter.add_(0.1 * drawn)


def _small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield copies of a configuration that are cheap to build, the most faithful first."""
    for narrow in (False, True):
        small: Any = copy.deepcopy(config)
        try:
            small.vocab_size = min(small.vocab_size, _VOCAB)
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if isinstance(getattr(small, token, None), int):
                    setattr(small, token, small.vocab_size - 1)
            _cut_layers(small)
            _set(small, dict.fromkeys(_WINDOWS, _WINDOW))
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
    _set(config, _NARROW)
    if isinstance(getattr(config, "qk_rope_head_dim", None), int):
        _set(config, _LATENT)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(groups := getattr(config, name, None), int):
            setattr(config, name, {heads: _HEADS, 1: 1}.get(groups, 2))
    # State-space models derive these when a configuration is made, not when it is read.
    if isinstance(expand := getattr(config, "expand", None), int):
        config.intermediate_size = expand * config.hidden_size
        if isinstance(getattr(config, "num_heads", None), int):
            config.num_heads = config.intermediate_size // config.head_dim
    if isinstance(expand := getattr(config, "mamba_expand", None), (int, float)):
        inner = int(expand * config.hidden_size)
        heads = inner // _HEAD_DIM
        sizes = {"mamba_d_head": _HEAD_DIM, "mamba_n_heads": heads, "mamba_d_ssm": inner}
        _set(config, {**_STATE_SPACE, **sizes})


def _set(config: Any, values: dict[str, int]) -> None:
    """Set the fields that a configuration has as whole numbers."""
    for name, value in values.items():
        if type(getattr(config, name, None)) is int and not _is_property(config, name):
            setattr(config, name, value)


def _is_property(config: Any, name: str) -> bool:
    own_name = type(config).attribute_map.get(name, name)
    return isinstance(getattr(type(config), own_name, None), property)
