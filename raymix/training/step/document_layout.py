"""Document mode on the ranks of a run: who holds which document, and how shared ones are met.

The schedule of a step follows from its lengths, the layout of the ranks and a cost model; all
ranks work it out alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from raymix.context_parallel import ContextParallelGroups, heads_fit
from raymix.errors import RecipeError, ScheduleError
from raymix.recipe import DocumentData, Recipe
from raymix.schedule import CostModel, Layout, Link, load_cost_model
from raymix.streaming.sequences.step_plans import SchedulingConfig
from raymix.training.model.hf_model import matmul_parameters, switch_attention
from raymix.training.step.documents import ContextParallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raymix.training.model.parallel import World

# Multiplications and additions per second of one device: a GPU of the class of an H100 in
# bfloat16, and one core of a server in float32.
_GPU = {"linear": 500e12, "attention": 400e12, "byte_s": 6.3e-12, "latency_s": 44e-6}
_CPU = {"linear": 80e9, "attention": 50e9, "byte_s": 1e-9, "latency_s": 300e-6}
# Tokens at which a kernel reaches half its speed, and seconds to launch a layer's or a piece's.
_GPU_SMALL = {"attention": 128, "linear": 256, "layer_s": 240e-6, "piece_s": 0.0}
_CPU_SMALL = {"attention": 16, "linear": 32, "layer_s": 500e-6, "piece_s": 150e-6}


def tokens_per_rank(data: DocumentData, workers: int) -> int:
    """Return the tokens that a rank must hold of the longest document."""
    return -(-data.sequence_length // context_parallel_size(data, workers))


def context_parallel_size(data: DocumentData, workers: int) -> int:
    """Return how many of the workers may share a document; in one process none do."""
    return data.assign.context if workers else 1


def full_length_rows(recipe: Recipe, rows: int) -> int:
    """Return how many rows of a whole sequence length take the room of `rows`; at least one."""
    if not isinstance(recipe.data, DocumentData):
        return rows
    return max(1, rows // context_parallel_size(recipe.data, recipe.cluster.workers))


def layout_of(recipe: Recipe, data: DocumentData) -> Layout:
    """Return the ranks of a run in groups that may share documents."""
    workers = recipe.cluster.workers
    context = context_parallel_size(data, workers)
    # Gradients travel after the last micro-batch; parameters that are spread are gathered in each.
    barrier = "all" if recipe.train.parallel == "fsdp2" else "none"
    widths = data.assign.widths if context > 1 else ()
    return Layout(max(1, workers) // context, context, barrier=barrier, widths=widths)


def scheduling_config(
    recipe: Recipe, data: DocumentData, model: PreTrainedModel, *, rows: int, on_gpu: bool
) -> SchedulingConfig:
    """Return how the documents of a step are dealt out.

    Args:
        recipe: The run's.
        data: Its `data`.
        model: Its shape sets the costs, where no file has measured ones.
        rows: `train.micro_batch_rows`, of `tokens_per_rank` each.
        on_gpu: What it runs on.

    Raises:
        RecipeError: If the file of a measured cost model cannot be used.
    """
    memory = rows * tokens_per_rank(data, recipe.cluster.workers)
    if data.assign.cost is None:
        cost = assumed_cost(model, on_gpu=on_gpu, memory_tokens=memory)
    else:
        cost = replace(_measured(data.assign.cost), memory_tokens=memory)
    layout = layout_of(recipe, data)
    return SchedulingConfig(seed=recipe.seed, layout=layout, cost=cost, planner=data.assign.planner)


def _measured(path: str) -> CostModel:
    try:
        return load_cost_model(path)
    except (ScheduleError, OSError) as error:
        raise RecipeError.at("data.assign.cost", path, f"cannot be used: {error}") from error


def assumed_cost(model: PreTrainedModel, *, on_gpu: bool, memory_tokens: int) -> CostModel:
    """Return the cost of a model on a device of ordinary speed; ratios matter, not seconds.

    Linear layers take 6 operations per parameter and token, causal attention 7 per layer, width
    and pair of tokens (its backward pass computes the scores again); keys and values travel twice.
    """
    speed, small = (_GPU, _GPU_SMALL) if on_gpu else (_CPU, _CPU_SMALL)
    config = model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width // heads
    linear_s = 6 * matmul_parameters(model) / speed["linear"]
    quadratic_s = 7 * layers * width / speed["attention"]
    travel = 2 * layers * speed["latency_s"], 2 * layers * 2 * keys * 4 * speed["byte_s"]
    return CostModel(
        quadratic_s=quadratic_s,
        edge_s=quadratic_s * small["attention"],
        piece_s=layers * small["piece_s"],
        linear_s=linear_s,
        base_s=linear_s * small["linear"],
        floor_s=layers * small["layer_s"],
        links=(Link(1 << 20, *travel),),
        memory_tokens=memory_tokens,
        hardware="assumed",
    )


def set_up_context_parallel(
    recipe: Recipe, data: DocumentData, model: PreTrainedModel, world: World
) -> ContextParallel:
    """Return how this rank attends to documents; a collective where documents can be shared.

    Switches the model to the attention of `raymix.context_parallel` if both compute the same.

    Raises:
        RecipeError: If documents are to be shared and the model cannot.
    """
    layout = layout_of(recipe, data)
    known = switch_attention(model, longest=data.sequence_length)
    config = model.config
    if layout.context > 1:
        kind, path = config.model_type, "data.assign.context"
        if not known:
            raise RecipeError.at(
                path,
                layout.context,
                f"{kind} models, as this one is configured, cannot share a document",
                fix="Set it to 1; or take a model with plain attention, without dropout or windows",
            )
        heads = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        odd = [w for w in layout.widths if not heads_fit(heads, keys, w)]
        if data.assign.exchange == "ulysses" and odd:
            raise RecipeError.at(
                "data.assign.exchange",
                "ulysses",
                f"{heads} heads and {keys} key heads cannot be dealt out to {odd[0]} workers",
                fix="Take gather",
            )
    return ContextParallel(
        world.rank, ContextParallelGroups.of(layout), data.assign.exchange, known
    )
