"""Attention of a flat row that holds whole documents and shards, as one differentiable operation.

    forward:  send keys and values | local documents | wait, shared documents
    backward: shared documents, send gradients | local documents | wait

What stands between the bars is done while the message travels (Skrull, arXiv 2505.19609, eq. 2).
A rank without shared documents communicates nothing.
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
    held: LocalShards,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Return causal attention inside each document, shape (T, H, D).

    All ranks of a team must call it, and its backward pass, in the same order.

    Args:
        query_THD: Queries of this rank's T tokens, H heads of width D.
        key_TKD: Keys of its K key heads; K divides H.
        value_TKD: Values.
        held: What the T tokens are.
        scale: What scores are multiplied by; left out, D^-0.5.

    Raises:
        ValueError: If the row has another number of tokens.
    """
    if len(query_THD) != held.tokens:
        raise ValueError(f"{len(query_THD)} tokens, where the micro-batch has {held.tokens}")
    scale = query_THD.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = _Attention.apply(query_THD, key_TKD, value_TKD, held, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        ctx, query, key, value, held, scale = args
        kernel, exchange = kernel_for(query, scale), EXCHANGES[held.exchange]
        mine, parts = _parts(held)
        sent = [
            exchange.send(shared, (query[part], key[part], value[part]))
            for shared, part in zip(held.shared, parts, strict=True)
        ]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept: list[Tensors] = []
        if held.local.queries:
            out[mine], sums = kernel.forward(query[mine], key[mine], value[mine], held.local)
            kept.append((sums,))
        for shared, under_way, part in zip(held.shared, sent, parts, strict=True):
            out[part], needed = exchange.attend(shared, under_way, kernel)
            kept.append(needed)
        ctx.held, ctx.scale = held, scale
        ctx.sizes = [len(tensors) for tensors in kept]
        saved = (tensor for tensors in kept for tensor in tensors)
        ctx.save_for_backward(query, key, value, out, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        held: LocalShards = ctx.held
        every, kept = ctx.saved_tensors[:4], _split(ctx.saved_tensors[4:], ctx.sizes)
        kernel, exchange = kernel_for(grad, ctx.scale), EXCHANGES[held.exchange]
        mine, parts = _parts(held)
        local = kept.pop(0) if held.local.queries else ()
        shared = [
            (documents, part, tuple(rows[part] for rows in every), needed)
            for documents, part, needed in zip(held.shared, parts, kept, strict=True)
        ]
        sent = [
            exchange.send_back(documents, grad[part], own, needed, kernel)
            for documents, part, own, needed in shared
        ]
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in every[:3]]
        if local:
            query, key, value, out = (rows[mine] for rows in every)
            saved = query, key, value, out, local[0]
            _fill(found, mine, kernel.backward(grad[mine], saved, held.local))
        for under_way, (documents, part, own, needed) in zip(sent, shared, strict=True):
            _fill(found, part, exchange.receive(documents, under_way, own, needed, kernel))
        return *found, None, None


def _fill(wholes: Sequence[torch.Tensor], rows: slice, parts: Sequence[torch.Tensor]) -> None:
    for whole, part in zip(wholes, parts, strict=True):
        whole[rows] = part


def _parts(held: LocalShards) -> tuple[slice, list[slice]]:
    """Return where in the row the local tokens are, and those of each team."""
    begin, found = held.local.queries, list[slice]()
    for shared in held.shared:
        found.append(slice(begin, begin + shared.tokens))
        begin += shared.tokens
    return slice(held.local.queries), found


def _split(flat: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[Tensors]:
    rest = iter(flat)
    return [tuple(next(rest) for _ in range(size)) for size in sizes]
