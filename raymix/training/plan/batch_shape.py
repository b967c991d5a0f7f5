"""Steps and batches of a run, as far as its recipe and the device determine them."""

from __future__ import annotations

from dataclasses import dataclass

from raymix.recipe import DocumentData, Recipe
from raymix.training.host.machine import Resources
from raymix.training.plan.mixer_context import count_steps
from raymix.training.step.rank_layout import context_parallel_size, tokens_per_rank


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Steps and batches of a run."""

    steps: int
    tokens: int
    """Tokens per step."""
    rows: int
    """Rows per step; approximate in document mode."""
    rows_per_worker: tuple[int, int]
    """Minimum and maximum rows of a worker in a step, of `row_tokens` each."""
    row_tokens: int
    """Tokens of a row on one worker: the sequence length over the context-parallel size."""
    context_parallel: int
    """Workers that may share a document."""
    on_gpu: bool
    bf16: bool

    @classmethod
    def of(cls, recipe: Recipe, available: Resources) -> BatchShape:
        """Return the steps and batches of a run on a machine or cluster."""
        data, train, workers = recipe.data, recipe.train, max(1, recipe.cluster.workers)
        row_tokens, context_parallel, rank_rows = data.sequence_length, 1, data.step_rows
        if isinstance(data, DocumentData):
            row_tokens = tokens_per_rank(data, recipe.cluster.workers)
            context_parallel = context_parallel_size(data, recipe.cluster.workers)
            # A worker has a part of each document that its group shares, so its rows are shorter
            # and it has more of them: the tokens per worker are the same.
            rank_rows = -(-data.step_tokens // row_tokens)
        on_gpu = recipe.cluster.gpus_per_worker == 1 or (
            recipe.cluster.gpus_per_worker == "auto" and available.gpus >= workers
        )
        return cls(
            steps=count_steps(recipe),
            tokens=data.step_tokens,
            rows=data.step_rows,
            rows_per_worker=(rank_rows // workers, -(-rank_rows // workers)),
            row_tokens=row_tokens,
            context_parallel=context_parallel,
            on_gpu=on_gpu,
            bf16=train.uses_bf16(on_gpu=on_gpu),
        )
