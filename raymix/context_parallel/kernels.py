"""Attention over pieces on one device, forward and backward, without dense masks.

Forward gives the output and the logarithm of each query's sum of exponentials, from which the
backward pass makes the probabilities again. On a CPU a piece is a rectangle, all of whose keys
all of its queries see, and a causal square; the two are joined by their logarithms (online
softmax: Milakov & Gimelshein 2018), so nothing that is masked is computed. On a CUDA device one
call does all pieces: the flash kernel where types and sizes allow it, else the memory-efficient
one.

Letters: T queries, S keys, H query heads, K key heads, G = H / K query heads per key head, D
width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from raymix.context_parallel.segments import AttentionSegment, AttentionSegments

_OPS = torch.ops.aten
# The efficient kernel's name for a causal mask whose last query sees the last key.
_FROM_BOTTOM_RIGHT = 2
Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys, values, output and log-sums."""


class Kernel(Protocol):
    """Attention over pieces."""

    @property
    def scale(self) -> float:
        """Return what scores are multiplied by."""
        ...

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, shape (T, H, D), and the log-sums in a shape of the kernel's own."""
        ...

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values.

        Args:
            grad_THD: That of the output.
            saved: Queries, keys, values, output and log-sums.
            pieces: As in the forward pass.
        """
        ...


def kernel_for(query_THD: torch.Tensor, scale: float) -> Kernel:
    """Return the kernel for queries of this device, type and width."""
    if query_THD.device.type != "cuda":
        return CpuKernel(scale)
    half = query_THD.dtype in (torch.float16, torch.bfloat16)
    # The flash kernels want a width in eights, up to 256, and Ampere or newer.
    width = query_THD.shape[-1]
    new = torch.cuda.get_device_capability(query_THD.device) >= (8, 0)
    flash = half and new and width % 8 == 0 and width <= 256
    return FlashKernel(scale) if flash else EfficientKernel(scale)


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """Piece by piece with torch's flash attention for CPUs; float64, float32 and bfloat16."""

    scale: float

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the log-sums, float32 or float64 of shape (T, H)."""
        out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        exact = torch.float64 if query_THD.dtype == torch.float64 else torch.float32
        sums_TH = torch.empty(query_THD.shape[:2], dtype=exact)
        for piece in pieces.every:
            rows = slice(piece.query, piece.query + piece.queries)
            query = _grouped(query_THD[rows], key_SKD.shape[1])
            parts = [
                _OPS._scaled_dot_product_flash_attention_for_cpu(
                    query, _spread(key_SKD[keys], query), _spread(value_SKD[keys], query),
                    0.0, causal, scale=self.scale,
                )
                for keys, causal in _blocks(piece)
            ]  # fmt: skip
            out, sums = parts[0] if len(parts) == 1 else _joined(parts)
            _grouped(out_THD[rows], key_SKD.shape[1]).copy_(out)
            _grouped(sums_TH[rows, :, None], key_SKD.shape[1]).copy_(sums[..., None])
        return out_THD, sums_TH

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        query_THD, key_SKD, value_SKD, out_THD, sums_TH = saved
        heads = key_SKD.shape[1]
        grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in saved[:3])
        for piece in pieces.every:
            rows = slice(piece.query, piece.query + piece.queries)
            query, out, grad = (_grouped(x[rows], heads) for x in (query_THD, out_THD, grad_THD))
            sums = _grouped(sums_TH[rows, :, None], heads)[..., 0]
            for keys, causal in _blocks(piece):
                key, value = _spread(key_SKD[keys], query), _spread(value_SKD[keys], query)
                found = _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, query, key, value, out, sums, 0.0, causal, scale=self.scale
                )
                _grouped(grads[0][rows], heads).add_(found[0])
                for whole, part in zip(grads[1:], found[1:], strict=True):
                    whole[keys].add_(part.sum(0).transpose(0, 1))
        return grads[0], grads[1], grads[2]


def _blocks(piece: AttentionSegment) -> list[tuple[slice, bool]]:
    """Return the keys of the rectangle, if there is one, and of the causal square."""
    square = (slice(piece.key + piece.before, piece.key + piece.keys), True)
    rectangle = (slice(piece.key, piece.key + piece.before), False)
    return [rectangle, square] if piece.before else [square]


def _grouped(rows_THD: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a view of (T, H, D) as (G, K, T, D): the heads that share keys stand apart."""
    return rows_THD.unflatten(1, (heads, -1)).permute(2, 1, 0, 3)


def _spread(rows_SKD: torch.Tensor, query_GKTD: torch.Tensor) -> torch.Tensor:
    """Return (S, K, D) as (G, K, S, D), repeated by a stride of 0 and not in memory."""
    return rows_SKD.transpose(0, 1).expand(query_GKTD.shape[0], -1, -1, -1)


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sums of attention over the keys of two blocks."""
    (first, first_sums), (second, second_sums) = parts
    sums = torch.logaddexp(first_sums, second_sums)
    left, right = ((part - sums).exp()[..., None] for part in (first_sums, second_sums))
    return first * left + second * right, sums


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """All pieces in one call of the flash kernel that torch has; float16 and bfloat16 on CUDA."""

    scale: float

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the log-sums, shape (H, T)."""
        shape = pieces.varlen(query_THD.device)
        out_THD, sums_HT, *_ = _OPS._flash_attention_forward(
            query_THD.contiguous(),
            _picked(key_SKD, shape.rows),
            _picked(value_SKD, shape.rows),
            shape.query_P1,
            shape.key_P1,
            shape.most_queries,
            shape.most_keys,
            0.0,
            True,
            False,
            scale=self.scale,
        )
        return out_THD, sums_HT

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        query_THD, key_SKD, value_SKD, out_THD, sums_HT = saved
        shape = pieces.varlen(query_THD.device)
        # Without dropout no random numbers are drawn; the state is asked for all the same.
        state = torch.zeros(2, dtype=torch.uint64, device=query_THD.device)
        grad_query, grad_key, grad_value = _OPS._flash_attention_backward(
            grad_THD.contiguous(),
            query_THD.contiguous(),
            _picked(key_SKD, shape.rows),
            _picked(value_SKD, shape.rows),
            out_THD,
            sums_HT,
            shape.query_P1,
            shape.key_P1,
            shape.most_queries,
            shape.most_keys,
            0.0,
            True,
            state,
            torch.empty(0, device=query_THD.device),
            scale=self.scale,
        )
        back = [_put(part, key_SKD, shape.rows) for part in (grad_key, grad_value)]
        return grad_query, back[0], back[1]


@dataclass(frozen=True, slots=True)
class EfficientKernel:
    """All pieces in one call of the memory-efficient kernel; float32 as well, on CUDA.

    It knows no heads that share keys: these are repeated here, in memory.
    """

    scale: float

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the log-sums, padded to the longest piece."""
        shape = pieces.varlen(query_THD.device)
        groups = query_THD.shape[1] // key_SKD.shape[1]
        out, sums, *_ = _OPS._efficient_attention_forward(
            query_THD[None],
            _picked(key_SKD, shape.rows).repeat_interleave(groups, 1)[None],
            _picked(value_SKD, shape.rows).repeat_interleave(groups, 1)[None],
            None,
            shape.query_P1,
            shape.key_P1,
            shape.most_queries,
            shape.most_keys,
            0.0,
            _FROM_BOTTOM_RIGHT,
            True,
            scale=self.scale,
        )
        return out[0], sums

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        pieces: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        query_THD, key_SKD, value_SKD, out_THD, sums = saved
        shape = pieces.varlen(query_THD.device)
        groups = query_THD.shape[1] // key_SKD.shape[1]
        # Without dropout no random numbers are drawn; seed and offset are asked for all the same.
        none = torch.zeros((), dtype=torch.int64, device=query_THD.device)
        grad_query, *rest, _ = _OPS._efficient_attention_backward(
            grad_THD[None].contiguous(),
            query_THD[None],
            _picked(key_SKD, shape.rows).repeat_interleave(groups, 1)[None],
            _picked(value_SKD, shape.rows).repeat_interleave(groups, 1)[None],
            None,
            out_THD[None],
            shape.query_P1,
            shape.key_P1,
            shape.most_queries,
            shape.most_keys,
            sums,
            0.0,
            none,
            none,
            _FROM_BOTTOM_RIGHT,
            False,
            scale=self.scale,
        )
        summed = [part[0].unflatten(1, (-1, groups)).sum(2) for part in rest]
        back = [_put(part, key_SKD, shape.rows) for part in summed]
        return grad_query[0], back[0], back[1]


def _picked(rows_SKD: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return rows_SKD.contiguous() if rows is None else rows_SKD[rows]


def _put(part: torch.Tensor, like_SKD: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return gradients of the rows picked, added up where a row was picked more than once."""
    if rows is None:
        return part
    # Stretches of one document share most of its keys: two summands, so any order gives the same.
    return torch.zeros_like(like_SKD, memory_format=torch.contiguous_format).index_add_(
        0, rows, part
    )
