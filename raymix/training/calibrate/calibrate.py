"""Measuring what a model costs on the devices at hand, for plans of long and short sequences.

Every figure is of forward and backward, all layers, as `raymix.schedule.cost.fit` wants them:

* attention: the kernel alone, with the model's heads, for a sequence on one rank, and for the
  share of a rank in a team: the i-th and the i-th last of 2 w equal pieces, so that all ranks work
  alike; here the first and the last.
* linear: the model on many documents of few tokens, less the attention of these.
* gather: an all-gather of keys and values and a reduce-scatter of their gradients over gloo or
  NCCL, in as many processes as there are ranks.
* memory: what autograd keeps of a pass, counted (see `memory`), beside weights, gradients and
  moments.

Models too deep to fit, or too slow, are measured with one layer and with two; what one layer adds
counts for all others.

Legend: B documents, L tokens of each, H heads, D their width.
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

# Documents of the measurement of linear layers: so short that attention hardly counts.
_SHORT = 16
# And of that of memory.
_COUNTED = 512
_REPEATS = 3
# Sizes double up to the one whose measurement would take this part of all the time there is.
_PART = 0.1
_FIRST = 64
# Sizes that are measured however long they take.
_LEAST = 3
# Weights, gradients, AdamW's two moments, in float32.
_STATES = 4 * 4
# Hidden width from which on a model counts as large.
_WIDE = 2048
_GPU_SHARE, _CPU_SHARE = 0.8, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBudget:
    """How long and how far is measured."""

    seconds: float = 60.0
    """About how long all of it may take."""
    longest: int = 32_768
    """Tokens of the longest sequence that is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSetup:
    """What is measured, and on what."""

    config: PreTrainedConfig
    """The model's; attention in the usual fields of transformers."""
    device: torch.device
    ranks: int
    """Processes that gather from each other."""
    bf16: bool
    """Whether it runs under bf16 autocast."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of activations."""
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
        queries = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        return cls(queries, keys, width)


def preset_config(name: str) -> PreTrainedConfig:
    """Return the configuration of one of `raymix.schedule.MODELS`: Qwen2 of that shape.

    Raises:
        ScheduleError: If there is none of that name.
    """
    from transformers import Qwen2Config

    if name not in MODELS:
        raise ScheduleError.at("model", name, "not known", allowed=f"Known: {', '.join(MODELS)}")
    shape = MODELS[name]
    # Qwen2.5's heads: 64 wide in the small models, 128 in the large ones.
    width = 64 if shape.hidden < _WIDE else 128
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // width,
        num_key_value_heads=shape.key_values // width,
        tie_word_embeddings=shape.hidden < _WIDE,
    )


def recipe_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the configuration of a recipe's model; its corpus need not be prepared.

    Raises:
        RaymixError: If the model cannot be used.
    """
    corpus = Corpus.open(recipe.corpus.path) if Path(recipe.corpus.path).is_dir() else None
    return resolve_config(recipe.model, corpus_facts(recipe, corpus))


def calibrate(
    setup: CalibrationSetup,
    effort: CalibrationBudget,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[CostModel, list[Measurement]]:
    """Return the cost model that fits what was measured, and the measurements.

    Args:
        setup: What is measured.
        effort: How long.
        report: Told what is being done, line by line.

    Raises:
        ScheduleError: If the model does not fit into memory, or processes cannot reach each other.
    """
    if effort.longest < (shortest := _FIRST << (_LEAST - 1)):
        raise ScheduleError.at(
            "longest", effort.longest, f"too short to see how time grows; at least {shortest}"
        )
    taken: list[Measurement] = []
    report("attention")
    taken += _attention(setup, effort)
    report("linear layers")
    taken += _linear(setup, effort)
    if setup.ranks > 1:
        report(f"communication of {setup.ranks} ranks")
        taken += _gathers(setup)
    kept, budget = _memory(setup)
    for item in taken:
        report(f"{item.kind}: {item.tokens} tokens, width {item.width}: {1e3 * item.value:.3f} ms")
    cost = fit_cost_model(
        [*taken, *kept],
        hardware=describe_hardware(setup),
        date=datetime.now(UTC).date().isoformat(),
        memory_bytes=budget,
    )
    return cost, [*taken, *kept]


def with_links(cost: CostModel, links: tuple[Link, ...], of: str) -> CostModel:
    """Return a cost model with communication that is assumed, not measured; its name says so."""
    return replace(cost, links=links, hardware=f"{cost.hardware}; communication assumed: {of}")


def describe_hardware(setup: CalibrationSetup) -> str:
    """Return device, ranks, type and versions in words."""
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    else:
        name = f"CPU, {cores()} cores, {torch.get_num_threads()} threads"
    kind = "bf16" if setup.bf16 else "fp32"
    model = f"{setup.config.model_type}, {setup.config.num_hidden_layers} layers"
    return f"{name}; {model}, {kind}; {setup.ranks} ranks; torch {torch.__version__}"


def _attention(setup: CalibrationSetup, effort: CalibrationBudget) -> Iterator[Measurement]:
    layers = setup.config.num_hidden_layers
    for width in _widths(setup.ranks):
        spent = 0.0
        for turn, tokens in enumerate(_sizes(_FIRST * width, effort.longest)):
            if turn >= _LEAST and spent > _PART * effort.seconds:
                break
            seconds, spent = _timed(_kernel(setup, tokens, width), setup.device)
            yield Measurement("attention", tokens, layers * seconds, width)


def _kernel(
    setup: CalibrationSetup, tokens: int, width: int, documents: int = 1
) -> Callable[[], None]:
    """Return the attention of one rank of a team of `width`, forward and backward."""
    heads = Heads.of(setup.config)

    def made(n_heads: int, length: int) -> torch.Tensor:
        shape = (documents, n_heads, length, heads.width)
        return torch.randn(shape, dtype=setup.dtype, device=setup.device, requires_grad=True)

    key, value = made(heads.keys, tokens), made(heads.keys, tokens)
    if width == 1:
        query = made(heads.queries, tokens)

        def whole() -> None:
            functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads.keys != heads.queries
            ).sum().backward()

        return whole
    piece = tokens // (2 * width)
    parts = [(made(heads.queries, piece), end) for end in (piece, tokens)]

    def shards() -> None:
        for query, end in parts:
            functional.scaled_dot_product_attention(
                query,
                key[:, :, :end],
                value[:, :, :end],
                attn_mask=causal_lower_right(piece, end),
                enable_gqa=heads.keys != heads.queries,
            ).sum().backward()

    return shards


def _linear(setup: CalibrationSetup, effort: CalibrationBudget) -> Iterator[Measurement]:
    layers = setup.config.num_hidden_layers
    depths = _depths(setup)
    models = {depth: _model(setup, depth) for depth in depths}
    spent = 0.0
    for turn, tokens in enumerate(_sizes(_FIRST, effort.longest)):
        if turn >= _LEAST and spent > _PART * effort.seconds:
            break
        attention, _ = _timed(_kernel(setup, _SHORT, 1, tokens // _SHORT), setup.device)
        found = {}
        spent = 0.0
        for depth, model in models.items():
            whole, more = _timed(_pass(setup, model, tokens), setup.device)
            found[depth] = max(whole - depth * attention, 0.1 * whole)
            spent += more
        value = found[depths[0]]
        if len(depths) > 1:
            # What the second layer adds; a head that takes longer than both may hide it.
            value += (layers - 1) * max(found[2] - found[1], 0.0)
        yield Measurement("linear", tokens, value)


def _sizes(first: int, longest: int) -> Iterator[int]:
    """Yield `first` and its doubles up to `longest`."""
    while first <= longest:
        yield first
        first *= 2


def _depths(setup: CalibrationSetup) -> tuple[int, ...]:
    """Return the layers of the models that are measured."""
    layers = setup.config.num_hidden_layers
    if layers <= 2:
        return (layers,)
    room = _room(setup)
    if _STATES / 2 * _parameters(setup.config) < 0.5 * room and (
        setup.device.type == "cuda" or _parameters(setup.config) < 2e7
    ):
        return (layers,)
    if _STATES / 2 * _parameters(_shallow(setup.config, 3)) > room:
        raise ScheduleError.at(
            "model",
            setup.config.model_type,
            f"not even three layers fit into the {room} bytes there are",
        )
    return (1, 2)


def _shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers = layers
    if getattr(fewer, "layer_types", None):
        fewer.layer_types = list(fewer.layer_types)[:layers]
    return fewer


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_from_config(config).parameters())


def _model(setup: CalibrationSetup, layers: int) -> PackedLoss:
    with setup.device:
        model = model_from_config(_shallow(setup.config, layers)).train()
    return PackedLoss(model, linear_head=True)


def _pass(setup: CalibrationSetup, model: PackedLoss, tokens: int) -> Callable[[], None]:
    shape = (tokens // _SHORT, _SHORT)
    ids_BL = torch.randint(0, setup.config.vocab_size, shape, device=setup.device)
    positions_BL = torch.arange(_SHORT, device=setup.device).expand(shape)

    def run() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.bf16):
            loss, _ = model(ids_BL, positions_BL, ids_BL)
        loss.backward()

    return run


def _gathers(setup: CalibrationSetup) -> Iterator[Measurement]:
    heads, layers = Heads.of(setup.config), setup.config.num_hidden_layers
    row = 2 * heads.keys * heads.width
    sizes = [1 << power for power in range(8, 15, 2)]
    widths = _widths(setup.ranks)[1:]
    times = benchmark_collectives(
        setup.ranks, setup.device.type, widths=widths, sizes=sizes, row=row, bf16=setup.bf16
    )
    for (width, tokens), seconds in times.items():
        yield Measurement("gather", tokens, layers * seconds, width)


def _memory(setup: CalibrationSetup) -> tuple[list[Measurement], float]:
    """Return what passes of two sizes keep, and the bytes that there are for them."""
    on_gpu = setup.device.type == "cuda"
    taken: list[Measurement] = []
    for rows in (2, 8):
        # Documents of one length: a long one's mask is not what a rank's kernel needs.
        batch = Batch(rows=rows, length=_COUNTED, bf16=setup.bf16, on_gpu=on_gpu)
        taken.append(Measurement("memory", rows * _COUNTED, count_memory(setup.config, batch)))
    return taken, _room(setup) - _STATES * _parameters(setup.config)


def _room(setup: CalibrationSetup) -> float:
    """Return the bytes a rank may use."""
    if setup.device.type == "cuda":
        return _GPU_SHARE * torch.cuda.get_device_properties(setup.device).total_memory
    return _CPU_SHARE * memory()[0] / setup.ranks


def _widths(ranks: int) -> list[int]:
    """Return 1, 2, 4, ... up to all ranks."""
    widths = [1]
    while 2 * widths[-1] <= ranks:
        widths.append(2 * widths[-1])
    return widths if widths[-1] == ranks else [*widths, ranks]


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the median seconds of some repeats, and of all of them with the first."""
    begun = time.perf_counter()
    work()
    _wait(device)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
