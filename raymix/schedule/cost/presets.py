"""Cost models worked out from a model's shape and a device's figures, to plan with unmeasured.

These are assumptions, not measurements: `fit_cost_model` makes a model of what was measured.
Forward and backward of a layer take 3 times the multiplications of its forward pass, causal
attention 3.5 times (its backward computes the scores again). Keys and values travel twice: an
all-gather forward and a reduce-scatter backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.cost.model import CostModel, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the cost of a decoder depends on."""

    layers: int
    hidden: int
    key_values: int
    """Width of the keys: heads for keys and values times their size."""
    intermediate: int
    vocabulary: int
    memory_tokens: int
    """Tokens one device can hold; for these two Skrull's BucketSize on 80 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What communication and small kernels cost on a device."""

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
"""Qwen2.5's two shapes of Skrull's experiments."""

NETWORKS = {
    "nvlink": Network(latency_s=44e-6, byte_s=6.3e-12, half_attention=128),
    "slow": Network(latency_s=100e-6, byte_s=40e-12, half_attention=2048),
}
"""About Skrull's table 5 (all-gather: 44 us + 6.9 us per MB), and one where sharding is dear."""

# One device of the class of an H100, bfloat16: multiplications and additions per second.
_GEMM, _ATTENTION = 500e12, 400e12
_HALF_GEMM = 256
_LAUNCH_S = 240e-6


def preset(model: str, network: str) -> CostModel:
    """Return the assumed cost of one of `MODELS` on a device of the class of an H100.

    Raises:
        ScheduleError: If the model or the network is unknown.
    """
    _check("model", model, MODELS)
    _check("network", network, NETWORKS)
    shape, net = MODELS[model], NETWORKS[network]
    attend = 2 * shape.hidden * (shape.hidden + shape.key_values)
    weights = shape.layers * (attend + 3 * shape.hidden * shape.intermediate)
    weights += shape.hidden * shape.vocabulary
    linear_s = 6 * weights / _GEMM
    # Scores and values: 4 s^2 h forward, half of it causal.
    quadratic_s = 3.5 * 2 * shape.hidden * shape.layers / _ATTENTION
    return CostModel(
        quadratic_s=quadratic_s,
        edge_s=quadratic_s * net.half_attention,
        linear_s=linear_s,
        base_s=linear_s * _HALF_GEMM,
        floor_s=_LAUNCH_S * shape.layers,
        links=assumed_links(network, shape.layers, shape.key_values),
        memory_tokens=shape.memory_tokens,
        hardware=f"assumed: {model}, {network}",
    )


def assumed_links(network: str, layers: int, key_values: int) -> tuple[Link, ...]:
    """Return what gathering bfloat16 keys and values of a width costs on one of `NETWORKS`.

    Raises:
        ScheduleError: If the network is unknown.
    """
    _check("network", network, NETWORKS)
    net, calls = NETWORKS[network], 2 * layers
    token_bytes = 2 * 2 * key_values
    return (Link(1 << 20, calls * net.latency_s, calls * token_bytes * net.byte_s),)


def _check(path: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        near = did_you_mean(name, known)
        raise ScheduleError.at(
            f"cost.{path}", name, "not a preset", allowed=f"Known: {', '.join(known)}", fix=near
        )
