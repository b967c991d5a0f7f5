"""Differentiable attention over a flat row of whole documents and shards.

    forward:  send keys and values | local documents | wait, shared documents
    backward: shared documents, send gradients | local documents | wait

The middle column overlaps with the communication (Skrull, arXiv 2505.19609, eq. 2). A rank without
shared documents does not communicate. Letters: T tokens, H query heads, K key heads, D width of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raymix.context_parallel.exchange import EXCHANGES, Tensors
from raymix.context_parallel.kernels import kernel_for
from raymix.context_parallel.local_shards import LocalShards


def attention(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    shards: LocalShards,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Return causal attention within each document, shape (T, H, D).

    All ranks of a group must call it, and its backward pass, in the same order.

    Args:
        query_THD: Queries of this rank's T tokens, H heads of width D.
        key_TKD: Keys of its K key heads; K divides H.
        value_TKD: Values.
        shards: The documents and shards in the row of T tokens.
        scale: Factor on the scores, D^-0.5 if None.

    Raises:
        ValueError: If the row has another number of tokens.
    """
    if len(query_THD) != shards.tokens:
        raise ValueError(f"{len(query_THD)} tokens, where the micro-batch has {shards.tokens}")
    scale = query_THD.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = _Attention.apply(query_THD, key_TKD, value_TKD, shards, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        ctx, query, key, value, shards, scale = args
        kernel, exchange = kernel_for(query, scale), EXCHANGES[shards.exchange]
        local_rows, shared_rows = _row_slices(shards)
        # All exchanges start before any kernel runs, so that each overlaps with all the work.
        pending = [
            exchange.start_forward(shared, (query[rows], key[rows], value[rows]))
            for shared, rows in zip(shards.shared, shared_rows, strict=True)
        ]
        # The slices below cover all rows, so the memory needs no initialization.
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        saved: list[Tensors] = []
        if shards.local.n_queries:
            out[local_rows], lse = kernel.forward(
                query[local_rows], key[local_rows], value[local_rows], shards.local
            )
            saved.append((lse,))
        for shared, sent, rows in zip(shards.shared, pending, shared_rows, strict=True):
            out[rows], shared_saved = exchange.finish_forward(shared, sent, kernel)
            saved.append(shared_saved)
        ctx.shards, ctx.scale = shards, scale
        # save_for_backward takes a flat list. Tensors set as attributes of ctx would escape its
        # check against in-place changes, and `out` there would be a reference cycle.
        ctx.sizes = [len(tensors) for tensors in saved]
        ctx.save_for_backward(
            query, key, value, out, *(tensor for tensors in saved for tensor in tensors)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        shards: LocalShards = ctx.shards
        # Queries, keys, values and output of the whole row.
        tensors, saved = ctx.saved_tensors[:4], _split(ctx.saved_tensors[4:], ctx.sizes)
        kernel, exchange = kernel_for(grad, ctx.scale), EXCHANGES[shards.exchange]
        local_rows, shared_rows = _row_slices(shards)
        local_saved = saved.pop(0) if shards.local.n_queries else ()
        shared_inputs = [
            (shared, rows, tuple(tensor[rows] for tensor in tensors), shared_saved)
            for shared, rows, shared_saved in zip(shards.shared, shared_rows, saved, strict=True)
        ]
        pending = [
            exchange.start_backward(shared, grad[rows], own, shared_saved, kernel)
            for shared, rows, own, shared_saved in shared_inputs
        ]
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:3]]
        if local_saved:
            query, key, value, out = (tensor[local_rows] for tensor in tensors)
            kernel_inputs = query, key, value, out, local_saved[0]
            _fill(grads, local_rows, kernel.backward(grad[local_rows], kernel_inputs, shards.local))
        for sent, (shared, rows, own, shared_saved) in zip(pending, shared_inputs, strict=True):
            _fill(grads, rows, exchange.finish_backward(shared, sent, own, shared_saved, kernel))
        # One gradient per argument of forward; `shards` and `scale` have none.
        return *grads, None, None


def _fill(outs: Sequence[torch.Tensor], rows: slice, parts: Sequence[torch.Tensor]) -> None:
    for out, part in zip(outs, parts, strict=True):
        out[rows] = part


def _row_slices(shards: LocalShards) -> tuple[slice, list[slice]]:
    """Return the rows of the local documents, and those of each group's shared documents."""
    first, shared_rows = shards.local.n_queries, list[slice]()
    for shared in shards.shared:
        shared_rows.append(slice(first, first + shared.tokens))
        first += shared.tokens
    return slice(shards.local.n_queries), shared_rows


def _split(flat: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[Tensors]:
    rest = iter(flat)
    return [tuple(next(rest) for _ in range(size)) for size in sizes]
