"""How much memory a run takes, part by part, without allocating any of it.

Weights, gradients and optimizer states follow from the parameter count. What the forward pass
keeps for the backward pass is counted on fake tensors: the model runs without data, and every
tensor that autograd saves is added up, so the count holds for any architecture.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raymix._utils.compat.torch import fake_tensors
from raymix.context_parallel import (
    ContextParallelGroups,
    DocumentPart,
    LocalShards,
    attending,
    register,
)
from raymix.recipe import ModelConfig, TrainConfig
from raymix.training.model.hf_model import CorpusFacts, model_from_config, resolve_config
from raymix.training.model.loss import MAX_LOGIT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FP32 = 4
# Logits, their gradient, and the softmax in between.
_LOGIT_COPIES = 3
# Python, torch, transformers and Ray in one worker, before there is a model; measured.
_PROCESS_BYTES = 600_000_000
_ENOUGH_TOKENS_CPU = 8192
_ENOUGH_TOKENS_GPU = 32_768
# What the C library's heap keeps of freed tensors on a CPU: measured 0.5 to 0.85 of them.
_HEAP_SLACK = 0.7


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of the memory of a training worker."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass of a worker holds."""

    rows: int
    """Rows per pass."""
    length: int
    """Tokens per row."""
    bf16: bool
    """Whether it runs under bf16 autocast."""
    on_gpu: bool = False
    """Whether it runs on a GPU."""
    documents: bool = False
    """Whether its rows are documents one after the other, which need no mask of all pairs."""
    context_parallel: int = 1
    """Workers that may share a document: each gathers the keys and values of all of them."""


def auto_micro_batch_rows(
    max_rows: int, sequence_length: int, *, row_bytes: int, capacity_bytes: int, on_gpu: bool
) -> int:
    """Return the rows per forward pass that `train.micro_batch_rows: auto` stands for.

    As many as fit, up to the tokens beyond which larger passes are no faster; then evened out, so
    that all passes of a step are alike.

    Args:
        max_rows: Rows of the worker that has most in a step.
        sequence_length: Tokens per row.
        row_bytes: Memory that each row takes.
        capacity_bytes: Memory there is for rows.
        on_gpu: Whether the worker has a GPU.
    """
    enough = (_ENOUGH_TOKENS_GPU if on_gpu else _ENOUGH_TOKENS_CPU) // sequence_length
    rows = max(1, min(enough, capacity_bytes // max(1, row_bytes)))
    passes = -(-max_rows // rows)
    return -(-max_rows // passes)


def worker_memory(
    model: ModelConfig, facts: CorpusFacts, train: TrainConfig, batch: Batch, *, workers: int
) -> tuple[MemoryPart, ...]:
    """Return the parts of the memory of one worker.

    Args:
        model: The model.
        facts: What it takes from the corpus.
        train: How it is trained.
        batch: What a worker passes through it at once.
        workers: Workers over which FSDP2 spreads weights, gradients and optimizer states.
    """
    parameters, activations = _measure(model, facts, train, batch)
    held = parameters * _FP32
    share = held if train.parallel == "ddp" else -(-held // max(1, workers))
    logits = min(_LOGIT_COPIES * batch.rows * batch.length * facts.vocab_size * _FP32,
                 _LOGIT_COPIES * MAX_LOGIT_BYTES)  # fmt: skip
    return (
        MemoryPart("process", _PROCESS_BYTES),
        MemoryPart("weights", share),
        MemoryPart("gradients", share),
        MemoryPart("optimizer", 2 * share),
        MemoryPart("activations", activations),
        MemoryPart("gathered keys", _gathered_bytes(model, facts, batch)),
        MemoryPart("logits", logits),
        MemoryPart("heap", 0 if batch.on_gpu else int(_HEAP_SLACK * (activations + logits))),
    )


def checkpoint_bytes(parameters: int) -> int:
    """Return the size of one checkpoint: fp32 weights and AdamW's two moments."""
    return 3 * parameters * _FP32


def count_memory(config: PreTrainedConfig, batch: Batch) -> int:
    """Return the bytes that a pass keeps for its backward pass, the logits' pieces among them."""
    logits = min(_LOGIT_COPIES * batch.rows * batch.length * config.vocab_size * _FP32,
                 _LOGIT_COPIES * MAX_LOGIT_BYTES)  # fmt: skip
    kept = _count(config, batch)[1] + logits
    return kept if batch.on_gpu else int((1 + _HEAP_SLACK) * kept)


def _gathered_bytes(model: ModelConfig, facts: CorpusFacts, batch: Batch) -> int:
    """Return the bytes of keys and values from other workers, where all that is held is shared."""
    if batch.context_parallel == 1:
        return 0
    config = resolve_config(model, facts)
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    width = keys * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = batch.rows * batch.length * batch.context_parallel
    return 2 * config.num_hidden_layers * tokens * width * (2 if batch.bf16 else _FP32)


def _measure(
    model: ModelConfig, facts: CorpusFacts, train: TrainConfig, batch: Batch
) -> tuple[int, int]:
    """Return the parameters and the bytes that autograd keeps for one backward pass."""
    config = resolve_config(model, facts)
    layers, width = config.num_hidden_layers, config.hidden_size
    # A comparison plans a run for each mixer, all of one model.
    key = config.to_json_string(use_diff=False), batch
    if key not in _counted:
        _counted[key] = _count(config, batch)
    parameters, kept = _counted[key]
    if train.activation_checkpointing:
        # Each layer's input stays, and one layer at a time is computed again.
        kept = kept // layers + layers * batch.rows * batch.length * width * _FP32
    return parameters, kept


_counted: dict[tuple[str, Batch], tuple[int, int]] = {}


def _count(config: PreTrainedConfig, batch: Batch) -> tuple[int, int]:
    """Return the parameters and the bytes kept for backward, all activations among them."""
    with fake_tensors():
        fake = model_from_config(config).train()
        parameters = sum(parameter.numel() for parameter in fake.parameters())
        try:
            return parameters, _saved_bytes(fake, batch)
        except Exception:  # noqa: BLE001 - whatever a model does that fake tensors cannot
            layers, width = config.num_hidden_layers, config.hidden_size
            inner = getattr(config, "intermediate_size", None) or 4 * width
            # Roughly what a Llama layer keeps: norms, attention, gated MLP.
            kept = layers * batch.rows * batch.length * (16 * width + 4 * inner) * _FP32
            return parameters, kept


def _saved_bytes(model: PreTrainedModel, batch: Batch) -> int:
    """Return the bytes of the distinct storages saved for backward, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids_BL = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    # Positions that start again, as in packed rows, bring in the mask that keeps documents apart.
    positions_BL = (torch.arange(batch.length) % max(2, batch.length // 2)).expand_as(ids_BL)
    mixed = torch.autocast("cpu", torch.bfloat16) if batch.bf16 else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    attends: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if batch.documents:
        model.set_attn_implementation(register())
        ids_BL, positions_BL = (part.reshape(1, -1) for part in (ids_BL, positions_BL))
        attends = attending(
            LocalShards([DocumentPart(batch.length, (0,))] * batch.rows, 0, ContextParallelGroups())
        )
    with hooks, mixed, attends:
        model.base_model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
