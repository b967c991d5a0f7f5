"""Memory of a training worker, part by part, without allocating any of it.

Weights, gradients and optimizer states follow from the parameter count. Activations are counted
on fake tensors: the model runs without data, and all tensors that autograd saves for the backward
pass are added up, so the count holds for any architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from raymix.recipe.sections.lora import LoraConfig
from raymix.training.model.facts import CorpusFacts, MemoryPart, ModelSize
from raymix.training.model.hf_model import (
    model_from_config,
    resolve_config,
)
from raymix.training.model.lora import add_lora
from raymix.training.model.loss import MAX_LOGIT_BYTES
from raymix.training.model.optimizer_class import OptimizerTraits, parameter_elements

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FP32 = 4
# Logits, their softmax and their gradient.
_LOGIT_COPIES = 3
# Python, torch, transformers and Ray in one worker without a model; measured.
_PROCESS_BYTES = 600_000_000
# Tokens per forward pass beyond which larger passes are no faster.
_SATURATING_TOKENS_CPU = 8192
_SATURATING_TOKENS_GPU = 32_768
# Freed tensors that the C library's heap retains on a CPU, as a fraction: measured 0.5 to 0.85.
_HEAP_SLACK = 0.7


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Elements of a model's parameters."""

    parameters: int
    trained_elements: Mapping[str, int]
    """Of those that are trained, by role in `raymix.training.model.optimizer_class`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Shape and device of one forward pass of a worker."""

    rows: int
    """Rows per pass."""
    length: int
    """Tokens per row."""
    bf16: bool
    """Whether it runs under bf16 autocast."""
    on_gpu: bool = False
    """Whether it runs on a GPU."""
    documents: bool = False
    """Whether rows are sequences of documents, which need no (L, L) attention mask."""
    context_parallel: int = 1
    """Workers that may share a document; each gathers the keys and values of all of them."""


def auto_micro_batch_rows(
    max_rows: int, sequence_length: int, *, row_bytes: int, capacity_bytes: int, on_gpu: bool
) -> int:
    """Return the rows per forward pass for `train.micro_batch_rows: auto`.

    As many as fit, up to the tokens beyond which larger passes are no faster; then reduced so
    that all passes of a step have about the same size.

    Args:
        max_rows: Rows of the worker with the most rows in a step.
        sequence_length: Tokens per row.
        row_bytes: Memory of each row.
        capacity_bytes: Memory available for rows.
        on_gpu: Whether the worker has a GPU.
    """
    tokens = _SATURATING_TOKENS_GPU if on_gpu else _SATURATING_TOKENS_CPU
    # At least one row, even if it does not fit: the estimate may be wrong, and the run may work.
    rows = max(1, min(tokens // sequence_length, capacity_bytes // max(1, row_bytes)))
    passes = -(-max_rows // rows)
    return -(-max_rows // passes)


def worker_memory(
    model: ModelConfig,
    facts: CorpusFacts,
    train: TrainConfig,
    batch: Batch,
    *,
    workers: int,
    optimizer: OptimizerTraits,
) -> tuple[MemoryPart, ...]:
    """Return the parts of the memory of one worker.

    Args:
        model: The model's recipe.
        facts: The model's inputs from the corpus.
        train: The training recipe.
        batch: One forward pass.
        workers: Workers over which FSDP2 shards weights, gradients and optimizer states.
        optimizer: The optimizer's traits, for its states.
    """
    sizes, activations = _measure(model, facts, train, batch)
    ranks = 1 if train.parallel == "ddp" else max(1, workers)
    trained = sum(sizes.trained_elements.values())
    states = optimizer.bytes_of(sizes.trained_elements)
    logits = min(_LOGIT_COPIES * batch.rows * batch.length * facts.vocab_size * _FP32,
                 _LOGIT_COPIES * MAX_LOGIT_BYTES)  # fmt: skip
    return (
        MemoryPart("process", _PROCESS_BYTES),
        MemoryPart("weights", -(-sizes.parameters * _FP32 // ranks)),
        MemoryPart("gradients", -(-trained * _FP32 // ranks)),
        MemoryPart("optimizer", -(-states // ranks)),
        MemoryPart("activations", activations),
        MemoryPart("gathered keys", _gathered_bytes(model, facts, batch)),
        MemoryPart("logits", logits),
        MemoryPart("heap", 0 if batch.on_gpu else int(_HEAP_SLACK * (activations + logits))),
    )


def checkpoint_bytes(size: ModelSize, optimizer: OptimizerTraits) -> int:
    """Return the size of one checkpoint: fp32 weights, of adapters alone if any, and states."""
    return size.trainable * _FP32 + optimizer.bytes_of(size.trained_elements)


def count_memory(config: PreTrainedConfig, batch: Batch) -> int:
    """Return the bytes that a forward pass saves for its backward pass, with a chunk of logits."""
    logits = min(_LOGIT_COPIES * batch.rows * batch.length * config.vocab_size * _FP32,
                 _LOGIT_COPIES * MAX_LOGIT_BYTES)  # fmt: skip
    saved = _count(config, batch, None)[1] + logits
    return saved if batch.on_gpu else int((1 + _HEAP_SLACK) * saved)


def _gathered_bytes(model: ModelConfig, facts: CorpusFacts, batch: Batch) -> int:
    """Return the bytes of gathered keys and values, if all documents are shared by the group."""
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
) -> tuple[_Sizes, int]:
    """Return the model's sizes and the bytes that autograd saves for one backward pass."""
    config = resolve_config(model, facts)
    layers, width = config.num_hidden_layers, config.hidden_size
    # Cached: a comparison plans one run per mixer, all with the same model. A configuration is not
    # hashable, so its JSON with all fields is the key.
    adapters = model.lora.model_dump_json() if model.lora is not None else ""
    key = config.to_json_string(use_diff=False) + adapters, batch
    if key not in _count_cache:
        _count_cache[key] = _count(config, batch, model.lora)
    sizes, saved = _count_cache[key]
    if train.activation_checkpointing:
        # The inputs of all layers are saved, and one layer at a time is recomputed.
        saved = saved // layers + layers * batch.rows * batch.length * width * _FP32
    return sizes, saved


_count_cache: dict[tuple[str, Batch], tuple[_Sizes, int]] = {}


def _count(config: PreTrainedConfig, batch: Batch, lora: LoraConfig | None) -> tuple[_Sizes, int]:
    """Return the sizes and the bytes saved for the backward pass without checkpointing."""
    built = None
    if lora is not None:
        # Not among fake tensors: peft moves new adapters by `Module.to`, which fails on them.
        with torch.device("meta"):
            built = add_lora(model_from_config(config), lora, seed=0)
    with fake_tensors():
        fake = (model_from_config(config) if built is None else _on_cpu(built)).train()
        parameters = sum(parameter.numel() for parameter in fake.parameters())
        sizes = _Sizes(parameters, parameter_elements(fake))
        try:
            return sizes, _saved_bytes(fake, batch)
        except Exception:  # noqa: BLE001 - models may read values, which fake tensors do not have
            layers, width = config.num_hidden_layers, config.hidden_size
            inner = getattr(config, "intermediate_size", None) or 4 * width
            # About what a Llama layer saves: norms, attention, gated MLP.
            saved = layers * batch.rows * batch.length * (16 * width + 4 * inner) * _FP32
            return sizes, saved


def _on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the meta device with all its tensors on the CPU, without values."""
    # By identity, as tied parameters must stay one.
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[Any, Any] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    tensors[name] = moved.setdefault(id(tensor), empty)
    return model


def _saved_bytes(model: PreTrainedModel, batch: Batch) -> int:
    """Return the bytes of the distinct storages saved for backward, without parameters."""
    parameter_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # By storage, as views of one tensor are saved many times. The storages are referenced here so
    # that none is freed and its address used again.
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameter_storages:
            saved[storage._cdata] = storage
        return tensor

    ids_BL = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    # Positions that restart, as in packed rows, make transformers build its document mask.
    positions_BL = (torch.arange(batch.length) % max(2, batch.length // 2)).expand_as(ids_BL)
    mixed = torch.autocast("cpu", torch.bfloat16) if batch.bf16 else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    attention: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if batch.documents:
        model.set_attn_implementation(register())
        ids_BL, positions_BL = (tensor.reshape(1, -1) for tensor in (ids_BL, positions_BL))
        attention = attending(
            LocalShards([DocumentPart(batch.length, (0,))] * batch.rows, 0, ContextParallelGroups())
        )
    with hooks, mixed, attention:
        model.base_model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())
