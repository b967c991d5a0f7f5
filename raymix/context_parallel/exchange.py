"""Communication of context-parallel attention: all-gather of keys, or all-to-all of heads.

`GatherKeys` gathers all keys and values on every rank, for the rank's own queries (Llama 3, arXiv
2407.21783, section 3.3.2); `Ulysses` gives each rank all tokens of a part of the heads (arXiv
2309.14509). Both start their communication in `start_forward` and `start_backward`, so that the
caller can work on local documents until it has finished. Keys and values travel once per key head,
not once per query head.

Letters: w ranks in the group, T tokens of each of them, S = w T tokens of the documents, H query
heads, K key heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from raymix.context_parallel.kernels import Kernel
from raymix.context_parallel.local_shards import ExchangeName, SharedDocuments

Tensors = tuple[torch.Tensor, ...]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values."""


@dataclass(frozen=True, slots=True)
class PendingExchange:
    """An asynchronous collective and its tensors."""

    work: dist.Work | None
    tensors: Tensors
    """The receive buffer, then what else the receiver needs. The send buffer is among them: the
    backend reads it from another thread or stream, so it must stay allocated until then."""

    def wait(self) -> Tensors:
        """Return `tensors` once the collective has finished."""
        if self.work is not None:
            self.work.wait()
        return self.tensors


class Exchange(Protocol):
    """Attention to shared documents, in four steps that all ranks of a group take together."""

    def start_forward(self, shared: SharedDocuments, rows: Rows) -> PendingExchange:
        """Start to exchange this rank's rows: queries (T, H, D), keys and values (T, K, D)."""
        ...

    def finish_forward(
        self, shared: SharedDocuments, sent: PendingExchange, kernel: Kernel
    ) -> tuple[torch.Tensor, Tensors]:
        """Return this rank's output, (T, H, D), and the tensors to save for the backward pass."""
        ...

    def start_backward(
        self,
        shared: SharedDocuments,
        grad: torch.Tensor,
        own: Tensors,
        saved: Tensors,
        kernel: Kernel,
    ) -> PendingExchange:
        """Start the exchange of the backward pass.

        Args:
            shared: The documents.
            grad: The gradient of the output, (T, H, D).
            own: This rank's queries, keys, values and output.
            saved: The tensors that `finish_forward` returned.
            kernel: The device's kernel.
        """
        ...

    def finish_backward(
        self,
        shared: SharedDocuments,
        sent: PendingExchange,
        own: Tensors,
        saved: Tensors,
        kernel: Kernel,
    ) -> Tensors:
        """Return the gradients of this rank's queries, keys and values."""
        ...


class GatherKeys:
    """All-gather of keys and values; reduce-scatter of their gradients.

    The gathered keys and values are saved for the backward pass: with grouped-query attention they
    are small beside the other activations, and so they travel twice and not three times.
    """

    def start_forward(self, shared: SharedDocuments, rows: Rows) -> PendingExchange:
        """Start to gather keys and values."""
        query, *key_value = rows
        # Stacked, so that one collective pays its latency for both.
        own = torch.stack(key_value, dim=1)
        gathered = own.new_empty(shared.width * len(own), *own.shape[1:])
        return PendingExchange(_all_gather(gathered, own, shared.group), (gathered, query, own))

    def finish_forward(
        self, shared: SharedDocuments, sent: PendingExchange, kernel: Kernel
    ) -> tuple[torch.Tensor, Tensors]:
        """Return the output of this rank's queries."""
        gathered, query, _ = sent.wait()
        key_value = gathered[shared.order(gathered.device)]
        out, lse = kernel.forward(query, key_value[:, 0], key_value[:, 1], shared.shards)
        return out, (key_value, lse)

    def start_backward(
        self,
        shared: SharedDocuments,
        grad: torch.Tensor,
        own: Tensors,
        saved: Tensors,
        kernel: Kernel,
    ) -> PendingExchange:
        """Differentiate, and start to sum the gradients of keys and values over the ranks."""
        query, _, _, out = own
        key_value, lse = saved
        kernel_inputs = (query, key_value[:, 0], key_value[:, 1], out, lse)
        grad_query, *grad_key_value = kernel.backward(grad, kernel_inputs, shared.shards)
        # `order` is a permutation of all rows, so each row of the empty buffer is written.
        by_rank = torch.empty_like(key_value)
        by_rank[shared.order(key_value.device)] = torch.stack(grad_key_value, dim=1)
        summed = by_rank.new_empty(shared.tokens, *by_rank.shape[1:])
        work = _reduce_scatter(summed, by_rank, shared.group)
        return PendingExchange(work, (summed, grad_query, by_rank))

    def finish_backward(
        self,
        shared: SharedDocuments,
        sent: PendingExchange,
        own: Tensors,
        saved: Tensors,
        kernel: Kernel,
    ) -> Tensors:
        """Return the gradients of this rank's rows."""
        summed, grad_query, _ = sent.wait()
        return grad_query, summed[:, 0], summed[:, 1]


class Ulysses:
    """All-to-all between shards of tokens with all heads and all tokens with 1 / w of the heads.

    The width of the group must divide the query heads, and divide or be divided by the key heads;
    in the second case several ranks get the same key head.
    """

    def start_forward(self, shared: SharedDocuments, rows: Rows) -> PendingExchange:
        """Start to distribute the heads."""
        query, key, value = rows
        heads = _key_heads(key, shared.width)
        parts = [_by_heads(part, shared.width) for part in (query, key[:, heads], value[:, heads])]
        return _all_to_all(torch.cat(parts, dim=2), shared, key)

    def finish_forward(
        self, shared: SharedDocuments, sent: PendingExchange, kernel: Kernel
    ) -> tuple[torch.Tensor, Tensors]:
        """Return the output of this rank's tokens, all heads."""
        rows, _, own_key = sent.wait()
        packed = rows.flatten(0, 1)[shared.order(rows.device)]
        query, key, value = _unpack_heads(packed, own_key, shared.width)
        out, lse = kernel.forward(query, key, value, shared.documents)
        # Waits at once: the caller's local documents are done by now, nothing is left to overlap.
        received, *_ = _all_to_all(_by_rank(out, shared), shared).wait()
        return _join_heads(received), (packed, out, lse)

    def start_backward(
        self,
        shared: SharedDocuments,
        grad: torch.Tensor,
        own: Tensors,
        saved: Tensors,
        kernel: Kernel,
    ) -> PendingExchange:
        """Start to distribute the heads of the gradient."""
        return _all_to_all(_by_heads(grad, shared.width), shared)

    def finish_backward(
        self,
        shared: SharedDocuments,
        sent: PendingExchange,
        own: Tensors,
        saved: Tensors,
        kernel: Kernel,
    ) -> Tensors:
        """Differentiate, and return the gradients of this rank's rows."""
        packed, out, lse = saved
        own_key = own[1]
        rows, *_ = sent.wait()
        grad = rows.flatten(0, 1)[shared.order(rows.device)]
        kernel_inputs = (*_unpack_heads(packed, own_key, shared.width), out, lse)
        grads = kernel.backward(grad, kernel_inputs, shared.documents)
        received, *_ = _all_to_all(_by_rank(torch.cat(grads, dim=1), shared), shared).wait()
        query, key, value = _unpack_heads(received, own_key, shared.width)
        heads = _key_heads(own_key, shared.width)
        # A key head that went to several ranks comes back once from each: the gradients add up.
        summed = (
            torch.zeros_like(own_key, memory_format=torch.contiguous_format).index_add_(
                1, heads, _join_heads(part)
            )
            for part in (key, value)
        )
        return _join_heads(query), *summed


EXCHANGES: dict[ExchangeName, Exchange] = {"gather": GatherKeys(), "ulysses": Ulysses()}


def heads_fit(heads: int, key_heads: int, width: int) -> bool:
    """Return whether `Ulysses` can distribute a model's heads over a group of `width` ranks."""
    return heads % width == 0 and (key_heads % width == 0 or width % key_heads == 0)


def _key_heads(key_TKD: torch.Tensor, width: int) -> torch.Tensor:
    """Return the key heads of the ranks, rank by rank, the same number for each."""
    key_heads = key_TKD.shape[1]
    # With fewer key heads than ranks, each is repeated for width / K consecutive ranks.
    copies = max(key_heads, width)
    return torch.arange(copies, device=key_TKD.device) * key_heads // copies


def _unpack_heads(rows: torch.Tensor, key_TKD: torch.Tensor, width: int) -> Rows:
    """Return queries, keys and values of one rank's heads, packed along axis -2 of `rows`.

    Only the number of key heads of `key_TKD` is used.
    """
    key_heads = max(key_TKD.shape[1], width) // width
    query, key, value = rows.split([rows.shape[-2] - 2 * key_heads, key_heads, key_heads], dim=-2)
    return query, key, value


def _by_heads(rows_THD: torch.Tensor, width: int) -> torch.Tensor:
    """Return (T, H, D) as (w, T, H / w, D)."""
    return rows_THD.unflatten(1, (width, -1)).transpose(0, 1)


def _join_heads(rows: torch.Tensor) -> torch.Tensor:
    """Return (w, T, H / w, D) as (T, H, D)."""
    return rows.transpose(0, 1).flatten(1, 2)


def _by_rank(rows: torch.Tensor, shared: SharedDocuments) -> torch.Tensor:
    """Return rows in document order, (S, ...), as the rows of each rank, (w, T, ...)."""
    by_rank = torch.empty_like(rows)
    by_rank[shared.order(rows.device)] = rows
    return by_rank.unflatten(0, (shared.width, shared.tokens))


def _all_to_all(
    rows: torch.Tensor, shared: SharedDocuments, *extra: torch.Tensor
) -> PendingExchange:
    """Start to send part i of `rows` to rank i of the group; part i received is from rank i."""
    # The collective reads memory in order and rejects strided tensors.
    sent = rows.contiguous()
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received, sent, group=shared.group, async_op=True)
    return PendingExchange(work, (received, sent, *extra))


def _all_gather(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    # torch 2.13 renamed all_gather_into_tensor and reduce_scatter_tensor; the old names warn there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, own.contiguous(), group=group, async_op=True)
    return work


def _reduce_scatter(
    own: torch.Tensor, by_rank: torch.Tensor, group: dist.ProcessGroup
) -> dist.Work | None:
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work | None = reduce(own, by_rank, group=group, async_op=True)
    return work
