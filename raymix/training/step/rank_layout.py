"""The layout of a run's ranks in context-parallel groups, as a recipe describes it."""

from __future__ import annotations

from raymix.errors import RecipeError
from raymix.recipe import DocumentData, Recipe
from raymix.schedule import Layout


def tokens_per_rank(data: DocumentData, workers: int) -> int:
    """Return the tokens of the longest document on one rank of a context-parallel group."""
    return -(-data.sequence_length // context_parallel_size(data, workers))


def context_parallel_size(data: DocumentData, workers: int) -> int:
    """Return the number of workers in a context-parallel group; 1 without workers."""
    # A recipe for a cluster also runs in one process, which ignores `data.assign.context`.
    return data.assign.context if workers else 1


def full_length_rows(recipe: Recipe, rows: int) -> int:
    """Return how many full-length rows have as many tokens as `rows` rows of a rank; at least 1."""
    # Evaluation and probes do not share documents between ranks, so their rows are longer.
    if not isinstance(recipe.data, DocumentData):
        return rows
    return max(1, rows // context_parallel_size(recipe.data, recipe.cluster.workers))


def layout_of(recipe: Recipe, data: DocumentData) -> Layout:
    """Return the layout of a run's ranks in context-parallel groups."""
    workers = recipe.cluster.workers
    context = context_parallel_size(data, workers)
    # DDP reduces gradients once per step, after the last micro-batch. FSDP2 gathers parameters in
    # each, so all ranks wait for the slowest in every micro-batch.
    barrier = "all" if recipe.train.parallel == "fsdp2" else "none"
    widths = data.assign.widths if context > 1 else ()
    return Layout(max(1, workers) // context, context, barrier=barrier, widths=widths)


def check_unshared(context: int, model_type: str) -> None:
    """Check that no documents are to be shared, for a model that cannot share them.

    Args:
        context: Workers that may share a document.
        model_type: The model's type in transformers, for the message.

    Raises:
        RecipeError: If documents are to be shared.
    """
    if context > 1:
        raise RecipeError.at(
            "data.assign.context",
            context,
            f"{model_type} models, as this one is configured, cannot share a document",
            fix="Set it to 1; or use a model with plain attention, without dropout or windows",
        )
