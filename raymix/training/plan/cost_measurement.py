"""Measurement of a model's cost: on tensors of the meta device and fake ones, without weights."""

from __future__ import annotations

from dataclasses import replace

from raymix.training.model.facts import MemoryPart
from raymix.training.model.hf_model import model_size
from raymix.training.model.memory import (
    Batch,
    auto_micro_batch_rows,
    checkpoint_bytes,
    worker_memory,
)
from raymix.training.model.optimizer_class import check_optimizer, decays_weights, try_optimizer
from raymix.training.plan.model_cost import CostInputs, ModelCost


def measure_cost(inputs: CostInputs) -> ModelCost:
    """Return the cost of a model.

    Raises:
        RecipeError: If the model or the optimizer cannot be made, or do not fit the run.
    """
    model, facts, train, shape = inputs.model, inputs.facts, inputs.train, inputs.shape
    size = model_size(model, facts)
    optimizer = try_optimizer(train, on_gpu=shape.on_gpu)
    check_optimizer(train, optimizer)

    def parts(rows: int) -> tuple[MemoryPart, ...]:
        batch = Batch(rows, shape.row_tokens, shape.bf16, shape.on_gpu)
        if inputs.documents:
            batch = replace(batch, documents=True, context_parallel=shape.context_parallel)
        return worker_memory(
            model, facts, train, batch, workers=inputs.workers, optimizer=optimizer
        )

    rows, max_rows = train.micro_batch_rows, max(1, shape.rows_per_worker[1])
    if rows == "auto":
        # Memory is linear in the rows: two points give the bytes per row and the constant.
        one, two = (sum(part.bytes for part in parts(n)) for n in (1, 2))
        rows = auto_micro_batch_rows(
            max_rows,
            shape.row_tokens,
            row_bytes=two - one,
            capacity_bytes=inputs.capacity_bytes - (2 * one - two),
            on_gpu=shape.on_gpu,
        )
    rows = min(rows, max_rows)
    return ModelCost(
        parameters=size.parameters,
        trainable=size.trainable,
        flops_per_token=size.flops_per_token,
        parts=parts(rows),
        micro_batch_rows=rows,
        checkpoint_bytes=checkpoint_bytes(size, optimizer),
        decays_weights=decays_weights(train),
    )
