"""Document mode on the ranks of a run: cost model and context parallelism.

The schedule of a step is a function of its lengths, the layout and the cost model; every rank
computes the same one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from raymix.context_parallel import ContextParallelGroups, heads_fit
from raymix.errors import RecipeError, ScheduleError
from raymix.recipe import DocumentData, Recipe
from raymix.schedule import CostModel, Link, load_cost_model
from raymix.streaming.sequences.step_plans import SchedulingConfig
from raymix.training.model.facts import Isolation
from raymix.training.model.hf_model import matmul_parameters
from raymix.training.model.own_attention import switch_attention
from raymix.training.step.documents import ContextParallel
from raymix.training.step.rank_layout import check_unshared, layout_of, tokens_per_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raymix.training.model.parallel import World

# Assumed speeds of one device: FLOP/s, seconds per byte sent, and seconds per message. A GPU of the
# class of an H100 in bfloat16 over InfiniBand; one core of a server in float32 over loopback.
_GPU = {"linear": 500e12, "attention": 400e12, "byte_s": 6.3e-12, "latency_s": 44e-6}
_CPU = {"linear": 80e9, "attention": 50e9, "byte_s": 1e-9, "latency_s": 300e-6}
# Small kernels: tokens at which one reaches half its speed, seconds to launch a layer's
# kernels, and those of one attention segment.
_GPU_SMALL = {"attention": 128, "linear": 256, "layer_s": 240e-6, "piece_s": 0.0}
_CPU_SMALL = {"attention": 16, "linear": 32, "layer_s": 500e-6, "piece_s": 150e-6}


def scheduling_config(
    recipe: Recipe, data: DocumentData, model: PreTrainedModel, *, rows: int, on_gpu: bool
) -> SchedulingConfig:
    """Return the configuration of the document schedule.

    Args:
        recipe: The run's recipe.
        data: Its `data` section.
        model: The model, whose shape determines the costs if no file has measured ones.
        rows: `train.micro_batch_rows`, of `tokens_per_rank` each.
        on_gpu: Whether workers run on GPUs.

    Raises:
        RecipeError: If the file of a measured cost model cannot be used.
    """
    memory = rows * tokens_per_rank(data, recipe.cluster.workers)
    if data.assign.cost is None:
        cost = assumed_cost(model, on_gpu=on_gpu, memory_tokens=memory)
    else:
        # The memory of this run and not of the calibration, which had no optimizer or other rows.
        cost = replace(_measured_cost(data.assign.cost), memory_tokens=memory)
    layout = layout_of(recipe, data)
    return SchedulingConfig(seed=recipe.seed, layout=layout, cost=cost, planner=data.assign.planner)


def _measured_cost(path: str) -> CostModel:
    try:
        return load_cost_model(path)
    except (ScheduleError, OSError) as error:
        raise RecipeError.at("data.assign.cost", path, f"cannot be used: {error}") from error


def assumed_cost(model: PreTrainedModel, *, on_gpu: bool, memory_tokens: int) -> CostModel:
    """Return the cost model of a model on an assumed device; only ratios of costs matter.

    Linear layers take 6 operations per parameter and token, causal attention 7 per layer, width
    and pair of tokens (its backward pass recomputes the scores). Keys and values are sent in the
    forward pass, and their gradients in the backward pass.
    """
    speed, small = (_GPU, _GPU_SMALL) if on_gpu else (_CPU, _CPU_SMALL)
    config = model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width // heads
    linear_s = 6 * matmul_parameters(model) / speed["linear"]
    quadratic_s = 7 * layers * width / speed["attention"]
    # Latency and seconds per token: 2 passes; keys and values; 4 bytes each.
    transfer = 2 * layers * speed["latency_s"], 2 * layers * 2 * keys * 4 * speed["byte_s"]
    return CostModel(
        quadratic_s=quadratic_s,
        edge_s=quadratic_s * small["attention"],
        piece_s=layers * small["piece_s"],
        linear_s=linear_s,
        base_s=linear_s * small["linear"],
        floor_s=layers * small["layer_s"],
        links=(Link(1 << 20, *transfer),),
        memory_tokens=memory_tokens,
        hardware="assumed",
    )


def set_up_context_parallel(
    recipe: Recipe,
    data: DocumentData,
    model: PreTrainedModel,
    world: World,
    isolation: Isolation,
) -> ContextParallel:
    """Return context parallelism of this rank; a collective if documents can be shared.

    Switches the model to the attention of `raymix.context_parallel` if both compute the same.

    Args:
        recipe: The run's recipe.
        data: Its `data` section.
        model: The model.
        world: This rank.
        isolation: How the model keeps documents of one row apart.

    Raises:
        RecipeError: If documents are to be shared and the model does not support it.
    """
    layout = layout_of(recipe, data)
    # Another attention isolates only what attention mixes, and only what positions tell.
    supported = isolation == "positions" and switch_attention(model, longest=data.sequence_length)
    config = model.config
    if not supported:
        check_unshared(layout.context, config.model_type)
    elif layout.context > 1:
        heads = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        # Ulysses exchanges sequence shards for head shards, so each worker needs as many heads.
        unfit = [w for w in layout.widths if not heads_fit(heads, keys, w)]
        if data.assign.exchange == "ulysses" and unfit:
            raise RecipeError.at(
                "data.assign.exchange",
                "ulysses",
                f"{heads} heads and {keys} key heads cannot be divided among {unfit[0]} workers",
                fix="Use gather",
            )
    return ContextParallel(
        world.rank, ContextParallelGroups.of(layout), data.assign.exchange, supported
    )
