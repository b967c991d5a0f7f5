"""How the ranks of a team attend to the documents they share: two ways, one form.

`GatherKeys` brings all keys and values to every rank, for its own queries (Llama 3, arXiv
2407.21783, section 3.3.2); `Ulysses` brings all tokens of some of the heads to each rank (arXiv
2309.14509). Both begin their communication in `send` and `send_back`, so that the caller can work
on local documents until it has arrived. Keys and values travel once per key head, not once per
query head.

Letters: w ranks in the team, T tokens each of them holds, S = w T tokens of the documents, H query
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
class SentTensors:
    """What is under way."""

    work: dist.Work | None
    held: Tensors
    """Where it arrives, then what else the receiver needs; kept alive until then."""

    def arrived(self) -> Tensors:
        """Return `held` once it has arrived."""
        if self.work is not None:
            self.work.wait()
        return self.held


class Exchange(Protocol):
    """Attention to shared documents, in four steps that all ranks of a team take together."""

    def send(self, shared: SharedDocuments, rows: Rows) -> SentTensors:
        """Begin to exchange this rank's rows: queries (T, H, D), keys and values (T, K, D)."""
        ...

    def attend(
        self, shared: SharedDocuments, sent: SentTensors, kernel: Kernel
    ) -> tuple[torch.Tensor, Tensors]:
        """Return the output for this rank's rows, (T, H, D), and what the way back needs."""
        ...

    def send_back(
        self,
        shared: SharedDocuments,
        grad: torch.Tensor,
        own: Tensors,
        kept: Tensors,
        kernel: Kernel,
    ) -> SentTensors:
        """Begin the way back.

        Args:
            shared: The documents.
            grad: The gradient of the output, (T, H, D).
            own: This rank's queries, keys, values and output.
            kept: What `attend` kept.
            kernel: The device's.
        """
        ...

    def receive(
        self,
        shared: SharedDocuments,
        sent: SentTensors,
        own: Tensors,
        kept: Tensors,
        kernel: Kernel,
    ) -> Tensors:
        """Return the gradients of this rank's queries, keys and values."""
        ...


class GatherKeys:
    """All keys and values to every rank; the gradients of keys and values summed on the way back.

    What was gathered is kept for the backward pass: with heads that share keys it is small beside
    the other activations, and keys and values travel twice, not three times.
    """

    def send(self, shared: SharedDocuments, rows: Rows) -> SentTensors:
        """Begin to gather keys and values."""
        query, *rest = rows
        own = torch.stack(rest, dim=1)
        every = own.new_empty(shared.width * len(own), *own.shape[1:])
        return SentTensors(_all_gather(every, own, shared.group), (every, query, own))

    def attend(
        self, shared: SharedDocuments, sent: SentTensors, kernel: Kernel
    ) -> tuple[torch.Tensor, Tensors]:
        """Return the output of this rank's queries."""
        every, query, _ = sent.arrived()
        both = every[shared.order(every.device)]
        out, sums = kernel.forward(query, both[:, 0], both[:, 1], shared.shards)
        return out, (both, sums)

    def send_back(
        self,
        shared: SharedDocuments,
        grad: torch.Tensor,
        own: Tensors,
        kept: Tensors,
        kernel: Kernel,
    ) -> SentTensors:
        """Differentiate, and begin to sum the gradients of keys and values over the ranks."""
        query, _, _, out = own
        both, sums = kept
        saved = (query, both[:, 0], both[:, 1], out, sums)
        grad_query, *rest = kernel.backward(grad, saved, shared.shards)
        whole = torch.empty_like(both)
        whole[shared.order(both.device)] = torch.stack(rest, dim=1)
        mine = whole.new_empty(shared.tokens, *whole.shape[1:])
        return SentTensors(_reduce_scatter(mine, whole, shared.group), (mine, grad_query, whole))

    def receive(
        self,
        shared: SharedDocuments,
        sent: SentTensors,
        own: Tensors,
        kept: Tensors,
        kernel: Kernel,
    ) -> Tensors:
        """Return the gradients of this rank's rows."""
        mine, grad_query, _ = sent.arrived()
        return grad_query, mine[:, 0], mine[:, 1]


class Ulysses:
    """All tokens of a share of the heads to each rank, and back.

    Needs a team whose size divides the query heads and divides, or is divided by, the key heads;
    in the second case several ranks get the same key head.
    """

    def send(self, shared: SharedDocuments, rows: Rows) -> SentTensors:
        """Begin to deal out the heads."""
        query, key, value = rows
        heads = _key_heads(key, shared.width)
        parts = [_dealt(part, shared.width) for part in (query, key[:, heads], value[:, heads])]
        return _swap(torch.cat(parts, dim=2), shared, key)

    def attend(
        self, shared: SharedDocuments, sent: SentTensors, kernel: Kernel
    ) -> tuple[torch.Tensor, Tensors]:
        """Return the output of this rank's tokens, all heads."""
        rows, _, own_key = sent.arrived()
        every = rows.flatten(0, 1)[shared.order(rows.device)]
        query, key, value = _apart(every, own_key, shared.width)
        out, sums = kernel.forward(query, key, value, shared.documents)
        back, *_ = _swap(_by_rank(out, shared), shared).arrived()
        return _collected(back), (every, out, sums)

    def send_back(
        self,
        shared: SharedDocuments,
        grad: torch.Tensor,
        own: Tensors,
        kept: Tensors,
        kernel: Kernel,
    ) -> SentTensors:
        """Begin to deal out the gradient's heads."""
        return _swap(_dealt(grad, shared.width), shared)

    def receive(
        self,
        shared: SharedDocuments,
        sent: SentTensors,
        own: Tensors,
        kept: Tensors,
        kernel: Kernel,
    ) -> Tensors:
        """Differentiate, and return the gradients of this rank's rows."""
        every, out, sums = kept
        own_key = own[1]
        rows, *_ = sent.arrived()
        grad = rows.flatten(0, 1)[shared.order(rows.device)]
        saved = (*_apart(every, own_key, shared.width), out, sums)
        found = kernel.backward(grad, saved, shared.documents)
        back, *_ = _swap(_by_rank(torch.cat(found, dim=1), shared), shared).arrived()
        query, key, value = _apart(back, own_key, shared.width)
        heads = _key_heads(own_key, shared.width)
        summed = (
            torch.zeros_like(own_key, memory_format=torch.contiguous_format).index_add_(
                1, heads, _collected(part)
            )
            for part in (key, value)
        )
        return _collected(query), *summed


EXCHANGES: dict[ExchangeName, Exchange] = {"gather": GatherKeys(), "ulysses": Ulysses()}


def heads_fit(heads: int, key_heads: int, width: int) -> bool:
    """Return whether `Ulysses` can deal out a model's heads to a team of `width`."""
    return heads % width == 0 and (key_heads % width == 0 or width % key_heads == 0)


def _key_heads(key_TKD: torch.Tensor, width: int) -> torch.Tensor:
    """Return which key heads the ranks get, rank by rank; each as many."""
    heads = key_TKD.shape[1]
    many = max(heads, width)
    return torch.arange(many, device=key_TKD.device) * heads // many


def _apart(rows: torch.Tensor, key_TKD: torch.Tensor, width: int) -> Rows:
    """Return queries, keys and values of one rank's heads; `rows` has them in its last dim but one.

    `key_TKD` only says how many key heads there are in all.
    """
    keys = max(key_TKD.shape[1], width) // width
    query, key, value = rows.split([rows.shape[-2] - 2 * keys, keys, keys], dim=-2)
    return query, key, value


def _dealt(rows_THD: torch.Tensor, width: int) -> torch.Tensor:
    """Return (T, H, D) as (w, T, H / w, D)."""
    return rows_THD.unflatten(1, (width, -1)).transpose(0, 1)


def _collected(rows: torch.Tensor) -> torch.Tensor:
    """Return (w, T, H / w, D) as (T, H, D)."""
    return rows.transpose(0, 1).flatten(1, 2)


def _by_rank(rows: torch.Tensor, shared: SharedDocuments) -> torch.Tensor:
    """Return rows of the documents in order, (S, ...), as those of each rank, (w, T, ...)."""
    whole = torch.empty_like(rows)
    whole[shared.order(rows.device)] = rows
    return whole.unflatten(0, (shared.width, shared.tokens))


def _swap(rows: torch.Tensor, shared: SharedDocuments, *more: torch.Tensor) -> SentTensors:
    """Begin to send part i of `rows` to rank i of the team; part i that arrives is from rank i."""
    mine = rows.contiguous()
    theirs = torch.empty_like(mine)
    work = dist.all_to_all_single(theirs, mine, group=shared.group, async_op=True)
    return SentTensors(work, (theirs, mine, *more))


def _all_gather(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    # torch 2.13 renamed both; the old names warn there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, own.contiguous(), group=group, async_op=True)
    return work


def _reduce_scatter(
    own: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup
) -> dist.Work | None:
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work | None = reduce(own, whole, group=group, async_op=True)
    return work
