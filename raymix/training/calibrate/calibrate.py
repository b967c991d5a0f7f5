"""Calibration: measure a model's costs on this machine's devices, and fit a cost model.

All measurements are of forward and backward, over all layers, as `raymix.schedule.cost.fit`
takes them:

* attention: the kernel alone, with the model's heads, for a sequence on one rank, and for one rank
  of a context-parallel group of width w. Rank i has the i-th and the i-th last of 2 w equal
  segments, so that all ranks have the same work; here the first and the last.
* linear: the model on many short documents, minus their attention.
* gather: an all-gather of keys and values and a reduce-scatter of their gradients over gloo or
  NCCL, in one process per rank.
* memory: the bytes that autograd saves in a pass, counted (see `training.model.memory`), beside
  weights, gradients and moments.

Models that do not fit, or are too slow, are measured with one layer and with two; the difference
counts for each further layer.

Legend: B documents, L tokens of each.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from raymix.errors import ScheduleError
from raymix.schedule import MODELS, CostModel, Link, Measurement, fit_cost_model
from raymix.store import Corpus
from raymix.training.calibrate.collective_benchmark import benchmark_collectives
from raymix.training.host.machine import cores, memory
from raymix.training.model.hf_model import model_from_config, resolve_config
from raymix.training.model.loss import PackedLoss
from raymix.training.model.memory import Batch, count_memory
from raymix.training.plan.preflight import corpus_facts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from raymix.recipe import Recipe

# Tokens per document when linear layers are measured: so few that attention hardly counts.
_SHORT_TOKENS = 16
# And when memory is counted: usual for packed documents.
_MEMORY_TOKENS = 512
_REPEATS = 3
# Sizes double until the measurement of one takes more than this fraction of the time budget.
_SIZE_TIME_FRACTION = 0.1
_MIN_TOKENS = 64
# Sizes measured whatever they take: a quadratic needs three points.
_MIN_SIZES = 3
# Bytes per parameter: weights, gradients and AdamW's two moments in float32.
_STATE_BYTES = 4 * 4
# Hidden width from which on Qwen2.5 models have wider heads and an untied output embedding.
_LARGE_MODEL_WIDTH = 2048
_GPU_MEMORY_FRACTION, _CPU_MEMORY_FRACTION = 0.8, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBudget:
    """Time and sequence lengths of a calibration."""

    seconds: float = 60.0
    """Approximate total time."""
    longest: int = 32_768
    """Tokens of the longest sequence measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSetup:
    """The model and the devices to measure."""

    config: PreTrainedConfig
    """The model's configuration, with attention in the usual fields of transformers."""
    device: torch.device
    ranks: int
    """Processes of the collectives."""
    bf16: bool
    """Whether it runs under bf16 autocast."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of activations."""
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a model's attention."""

    queries: int
    keys: int
    width: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Heads:
        """Return the heads of a configuration."""
        # Older types have neither grouped keys nor a head width of their own.
        queries = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        return cls(queries, keys, width)


def preset_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a model of `raymix.schedule.MODELS`, as a Qwen2 of that shape.

    Raises:
        ScheduleError: If the name is unknown.
    """
    from transformers import Qwen2Config

    if name not in MODELS:
        raise ScheduleError.at("model", name, "unknown", allowed=f"Known: {', '.join(MODELS)}")
    shape = MODELS[name]
    # Qwen2.5's heads: 64 wide in the small models, 128 in the large ones.
    width = 64 if shape.hidden < _LARGE_MODEL_WIDTH else 128
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // width,
        num_key_value_heads=shape.key_values // width,
        tie_word_embeddings=shape.hidden < _LARGE_MODEL_WIDTH,
    )


def recipe_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the configuration of a recipe's model; the corpus need not be prepared.

    Raises:
        RaymixError: If the model cannot be used.
    """
    corpus = Corpus.open(recipe.corpus.path) if Path(recipe.corpus.path).is_dir() else None
    return resolve_config(recipe.model, corpus_facts(recipe, corpus))


def calibrate(
    setup: CalibrationSetup,
    budget: CalibrationBudget,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[CostModel, list[Measurement]]:
    """Return the fitted cost model and the measurements.

    Args:
        setup: The model and the devices.
        budget: Time and sequence lengths.
        report: Gets a line of text for each step of the work.

    Raises:
        ScheduleError: If the model does not fit into memory, or the processes cannot communicate.
    """
    if budget.longest < (shortest := _MIN_TOKENS << (_MIN_SIZES - 1)):
        raise ScheduleError.at(
            "longest", budget.longest, f"too short to fit the growth of time; at least {shortest}"
        )
    times: list[Measurement] = []
    report("attention")
    times += _measure_attention(setup, budget)
    report("linear layers")
    times += _measure_linear(setup, budget)
    if setup.ranks > 1:
        report(f"communication of {setup.ranks} ranks")
        times += _measure_collectives(setup)
    memory_use, capacity = _measure_memory(setup)
    for item in times:
        report(f"{item.kind}: {item.tokens} tokens, width {item.width}: {1e3 * item.value:.3f} ms")
    cost = fit_cost_model(
        [*times, *memory_use],
        hardware=describe_hardware(setup),
        date=datetime.now(UTC).date().isoformat(),
        memory_bytes=capacity,
    )
    return cost, [*times, *memory_use]


def with_links(cost: CostModel, links: tuple[Link, ...], network: str) -> CostModel:
    """Return a cost model with assumed communication; its description says so."""
    hardware = f"{cost.hardware}; communication assumed: {network}"
    return replace(cost, links=links, hardware=hardware)


def describe_hardware(setup: CalibrationSetup) -> str:
    """Return a description of device, model, data type, ranks and version."""
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    else:
        name = f"CPU, {cores()} cores, {torch.get_num_threads()} threads"
    dtype = "bf16" if setup.bf16 else "fp32"
    model = f"{setup.config.model_type}, {setup.config.num_hidden_layers} layers"
    return f"{name}; {model}, {dtype}; {setup.ranks} ranks; torch {torch.__version__}"


def _measure_attention(setup: CalibrationSetup, budget: CalibrationBudget) -> Iterator[Measurement]:
    layers = setup.config.num_hidden_layers
    for width in _widths(setup.ranks):
        spent_s = 0.0
        for index, tokens in enumerate(_sizes(_MIN_TOKENS * width, budget.longest)):
            if index >= _MIN_SIZES and spent_s > _SIZE_TIME_FRACTION * budget.seconds:
                break
            # All layers have the same attention, so one is measured.
            seconds, spent_s = _time(_attention_kernel(setup, tokens, width), setup.device)
            yield Measurement("attention", tokens, layers * seconds, width)


def _attention_kernel(
    setup: CalibrationSetup, tokens: int, width: int, documents: int = 1
) -> Callable[[], None]:
    """Return forward and backward of the attention of one rank in a group of `width`."""
    heads = Heads.of(setup.config)

    def random_heads(n_heads: int, length: int) -> torch.Tensor:
        shape = (documents, n_heads, length, heads.width)
        return torch.randn(shape, dtype=setup.dtype, device=setup.device, requires_grad=True)

    key, value = random_heads(heads.keys, tokens), random_heads(heads.keys, tokens)
    if width == 1:
        query = random_heads(heads.queries, tokens)

        def full_sequence() -> None:
            functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads.keys != heads.queries
            ).sum().backward()

        return full_sequence
    segment = tokens // (2 * width)
    # A short and a long segment: causal attention of one alone would be far from a rank's mean.
    segments = [(random_heads(heads.queries, segment), end) for end in (segment, tokens)]

    def rank_share() -> None:
        for query, end in segments:
            functional.scaled_dot_product_attention(
                query,
                key[:, :, :end],
                value[:, :, :end],
                attn_mask=causal_lower_right(segment, end),
                enable_gqa=heads.keys != heads.queries,
            ).sum().backward()

    return rank_share


def _measure_linear(setup: CalibrationSetup, budget: CalibrationBudget) -> Iterator[Measurement]:
    layers = setup.config.num_hidden_layers
    depths = _depths(setup)
    models = {depth: _model(setup, depth) for depth in depths}
    spent_s = 0.0
    for index, tokens in enumerate(_sizes(_MIN_TOKENS, budget.longest)):
        if index >= _MIN_SIZES and spent_s > _SIZE_TIME_FRACTION * budget.seconds:
            break
        kernel = _attention_kernel(setup, _SHORT_TOKENS, 1, tokens // _SHORT_TOKENS)
        attention, _ = _time(kernel, setup.device)
        seconds_by_depth = {}
        spent_s = 0.0
        for depth, model in models.items():
            total, elapsed = _time(_pass(setup, model, tokens), setup.device)
            # At least a tenth: attention timed alone may take longer than within the model.
            seconds_by_depth[depth] = max(total - depth * attention, 0.1 * total)
            spent_s += elapsed
        value = seconds_by_depth[depths[0]]
        if len(depths) > 1:
            # The second layer's time. With a large vocabulary it can be below the noise of the
            # head's, so the difference may be negative.
            value += (layers - 1) * max(seconds_by_depth[2] - seconds_by_depth[1], 0.0)
        yield Measurement("linear", tokens, value)


def _sizes(first: int, longest: int) -> Iterator[int]:
    """Yield `first` and its doubles up to `longest`."""
    while first <= longest:
        yield first
        first *= 2


def _depths(setup: CalibrationSetup) -> tuple[int, ...]:
    """Return the numbers of layers of the models to measure."""
    layers = setup.config.num_hidden_layers
    if layers <= 2:
        return (layers,)
    capacity = _capacity_bytes(setup)
    # Half the states: weights and gradients, as no optimizer runs. Half the capacity is left for
    # activations. On a CPU also the time counts: beyond 20 million parameters a pass takes seconds.
    if _STATE_BYTES / 2 * _parameters(setup.config) < 0.5 * capacity and (
        setup.device.type == "cuda" or _parameters(setup.config) < 2e7
    ):
        return (layers,)
    # Three, because the models of one and of two layers are alive together.
    if _STATE_BYTES / 2 * _parameters(_shallow(setup.config, 3)) > capacity:
        raise ScheduleError.at(
            "model",
            setup.config.model_type,
            f"three of its layers do not fit into {capacity} bytes of memory",
        )
    return (1, 2)


def _shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = layers
    # transformers checks that the list of layer types is as long as the model is deep.
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = list(shallow.layer_types)[:layers]
    return shallow


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_from_config(config).parameters())


def _model(setup: CalibrationSetup, layers: int) -> PackedLoss:
    # Made on the device: a large model may not fit into the host's memory.
    with setup.device:
        model = model_from_config(_shallow(setup.config, layers)).train()
    return PackedLoss(model, linear_head=True)


def _pass(setup: CalibrationSetup, model: PackedLoss, tokens: int) -> Callable[[], None]:
    shape = (tokens // _SHORT_TOKENS, _SHORT_TOKENS)
    ids_BL = torch.randint(0, setup.config.vocab_size, shape, device=setup.device)
    positions_BL = torch.arange(_SHORT_TOKENS, device=setup.device).expand(shape)

    def run() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.bf16):
            loss, _ = model(ids_BL, positions_BL, ids_BL)
        loss.backward()

    return run


def _measure_collectives(setup: CalibrationSetup) -> Iterator[Measurement]:
    heads, layers = Heads.of(setup.config), setup.config.num_hidden_layers
    row = 2 * heads.keys * heads.width
    sizes = [1 << power for power in range(8, 15, 2)]
    widths = _widths(setup.ranks)[1:]
    times = benchmark_collectives(
        setup.ranks, setup.device.type, widths=widths, sizes=sizes, row=row, bf16=setup.bf16
    )
    for (width, tokens), seconds in times.items():
        yield Measurement("gather", tokens, layers * seconds, width)


def _measure_memory(setup: CalibrationSetup) -> tuple[list[Measurement], float]:
    """Return the bytes saved in passes of two sizes, and the bytes available for them."""
    on_gpu = setup.device.type == "cuda"
    measurements: list[Measurement] = []
    # Two sizes give the bytes per token and the constant.
    for rows in (2, 8):
        # Documents of one length: the mask of a long one would count (L, L) bytes, which the
        # kernel of a rank does not need.
        batch = Batch(rows=rows, length=_MEMORY_TOKENS, bf16=setup.bf16, on_gpu=on_gpu)
        measurements.append(
            Measurement("memory", rows * _MEMORY_TOKENS, count_memory(setup.config, batch))
        )
    return measurements, _capacity_bytes(setup) - _STATE_BYTES * _parameters(setup.config)


def _capacity_bytes(setup: CalibrationSetup) -> float:
    """Return the bytes of memory that a rank may use."""
    if setup.device.type == "cuda":
        return _GPU_MEMORY_FRACTION * torch.cuda.get_device_properties(setup.device).total_memory
    return _CPU_MEMORY_FRACTION * memory()[0] / setup.ranks


def _widths(ranks: int) -> list[int]:
    """Return the group widths 1, 2, 4, ... and the number of ranks."""
    widths = [1]
    while 2 * widths[-1] <= ranks:
        widths.append(2 * widths[-1])
    return widths if widths[-1] == ranks else [*widths, ranks]


def _time(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the median seconds of the repeats, and the total seconds with the warm-up."""
    start_s = time.perf_counter()
    # Not counted: the first call allocates, and on a GPU it chooses kernels.
    work()
    _synchronize(device)
    seconds = []
    for _ in range(_REPEATS):
        repeat_start_s = time.perf_counter()
        work()
        _synchronize(device)
        seconds.append(time.perf_counter() - repeat_start_s)
    return statistics.median(seconds), time.perf_counter() - start_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
