"""Assumed cost models, computed from a model's shape and a device's specification.

These are assumptions; `fit_cost_model` fits a model to measurements. Forward and backward of a
layer take 3 times the multiplications of its forward pass, causal attention 3.5 times (its backward
recomputes the scores). Keys and values travel twice: an all-gather forward and a reduce-scatter
backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.cost.model import CostModel, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dimensions of a decoder that determine its cost."""

    layers: int
    hidden: int
    key_values: int
    """Width of the keys: number of key-value heads times head size."""
    intermediate: int
    vocabulary: int
    memory_tokens: int
    """Tokens one device can hold; for both `MODELS` Skrull's BucketSize on 80 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Costs of communication and of small attention kernels on a device."""

    latency_s: float
    """Seconds per collective and layer."""
    byte_s: float
    """Seconds per byte gathered."""
    half_attention: int
    """Query tokens at which the attention kernel reaches half its speed."""


MODELS = {
    "0.5b": Shape(
        layers=24,
        hidden=896,
        key_values=128,
        intermediate=4864,
        vocabulary=151_936,
        memory_tokens=26_000,
    ),
    "7b": Shape(
        layers=28,
        hidden=3584,
        key_values=512,
        intermediate=18_944,
        vocabulary=152_064,
        memory_tokens=13_000,
    ),
}
"""The two shapes of Qwen2.5 in Skrull's experiments."""

NETWORKS = {
    "nvlink": Network(latency_s=44e-6, byte_s=6.3e-12, half_attention=128),
    "slow": Network(latency_s=100e-6, byte_s=40e-12, half_attention=2048),
}
"""About Skrull's table 5 (all-gather: 44 us + 6.9 us per MB), and one with costly sharding."""

# Achieved FLOP/s of an H100-class device in bfloat16, of about 990e12 dense at peak.
_GEMM_FLOPS, _ATTENTION_FLOPS = 500e12, 400e12
# Tokens at which matrix products reach half their speed: a tile of a GEMM is 128 or 256 rows.
_HALF_SPEED_GEMM_TOKENS = 256
# Kernel launches of one layer, forward and backward.
_LAUNCH_S_PER_LAYER = 240e-6


def preset(model: str, network: str) -> CostModel:
    """Return the assumed cost model of one of `MODELS` on an H100-class device.

    Raises:
        ScheduleError: If the model or the network is unknown.
    """
    _check_known("model", model, MODELS)
    _check_known("network", network, NETWORKS)
    shape, device = MODELS[model], NETWORKS[network]
    # Queries and output are h x h, keys and values h x key_values; the MLP has three matrices.
    attention_parameters = 2 * shape.hidden * (shape.hidden + shape.key_values)
    parameters = shape.layers * (attention_parameters + 3 * shape.hidden * shape.intermediate)
    # The output head; the input embedding is a look-up, no product.
    parameters += shape.hidden * shape.vocabulary
    # 2 FLOPs per parameter and token forward, 4 backward.
    linear_s = 6 * parameters / _GEMM_FLOPS
    # Scores and values: 4 s^2 h FLOPs forward, half of it causal.
    quadratic_s = 3.5 * 2 * shape.hidden * shape.layers / _ATTENTION_FLOPS
    return CostModel(
        quadratic_s=quadratic_s,
        edge_s=quadratic_s * device.half_attention,
        linear_s=linear_s,
        base_s=linear_s * _HALF_SPEED_GEMM_TOKENS,
        floor_s=_LAUNCH_S_PER_LAYER * shape.layers,
        links=assumed_links(network, shape.layers, shape.key_values),
        memory_tokens=shape.memory_tokens,
        hardware=f"assumed: {model}, {network}",
    )


def assumed_links(network: str, layers: int, key_values: int) -> tuple[Link, ...]:
    """Return the cost of gathering bfloat16 keys and values on one of `NETWORKS`, for any width.

    Raises:
        ScheduleError: If the network is unknown.
    """
    _check_known("network", network, NETWORKS)
    # Two collectives per layer: the all-gather and the reduce-scatter.
    device, collectives = NETWORKS[network], 2 * layers
    # Two bytes each for keys and for values.
    token_bytes = 2 * 2 * key_values
    latency_s = collectives * device.latency_s
    # One entry for all widths: a ring moves (w - 1) / w of the tokens, nearly all in wide groups.
    return (Link(1 << 20, latency_s, collectives * token_bytes * device.byte_s),)


def _check_known(path: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ScheduleError.at(
            f"cost.{path}",
            name,
            "not a preset",
            allowed=f"Known: {', '.join(known)}",
            fix=did_you_mean(name, known),
        )
