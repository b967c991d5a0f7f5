"""Attention kernels over segments on one device, forward and backward, without dense masks.

The forward pass returns the output and the log-sum-exp (LSE) of each query's scores, from which
the backward pass recomputes the probabilities. On a CPU a segment is a rectangle of keys that all
its queries see, and a causal square; the two are merged by their LSE (online softmax: Milakov &
Gimelshein 2018), so no masked score is computed. On a CUDA device one call handles all segments:
the flash kernel where dtype and head width allow it, else the memory-efficient one.

Letters: T queries, S keys, H query heads, K key heads, G = H / K query heads per key head, D
width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from raymix.context_parallel.segments import AttentionSegment, AttentionSegments

_OPS = torch.ops.aten
# `CustomMaskType.CausalFromBottomRight` of the memory-efficient kernel: the last query of a segment
# sees its last key. The flash kernel aligns its causal mask this way by itself.
_CAUSAL_FROM_BOTTOM_RIGHT = 2
_MAX_FLASH_WIDTH = 256
Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys, values, output and LSE."""


class Kernel(Protocol):
    """Attention over segments."""

    @property
    def scale(self) -> float:
        """Return the factor on the scores."""
        ...

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, shape (T, H, D), and the LSE in a shape of the kernel's own."""
        ...

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values.

        Args:
            grad_THD: Gradient of the output.
            saved: Queries, keys, values, output and LSE.
            segments: As in the forward pass.
        """
        ...


def kernel_for(query_THD: torch.Tensor, scale: float) -> Kernel:
    """Return the kernel for queries of this device, type and width."""
    if query_THD.device.type != "cuda":
        return CpuKernel(scale)
    half = query_THD.dtype in (torch.float16, torch.bfloat16)
    # Torch's flash kernels need Ampere (compute capability 8.0) or newer and a head width that is
    # a multiple of 8, at most 256. The operator checks this only by failing, so it is checked here.
    width = query_THD.shape[-1]
    ampere = torch.cuda.get_device_capability(query_THD.device) >= (8, 0)
    flash = half and ampere and width % 8 == 0 and width <= _MAX_FLASH_WIDTH
    return FlashKernel(scale) if flash else EfficientKernel(scale)


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """Segment by segment with torch's flash attention for CPUs; float64, float32 and bfloat16."""

    scale: float

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the LSE, float32 or float64 of shape (T, H)."""
        out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        # The operator accumulates bfloat16 in float32, and returns its LSE so.
        lse_dtype = torch.float64 if query_THD.dtype == torch.float64 else torch.float32
        lse_TH = torch.empty(query_THD.shape[:2], dtype=lse_dtype)
        for segment in segments.segments:
            rows = slice(segment.first_query, segment.first_query + segment.n_queries)
            query = _split_heads(query_THD[rows], key_SKD.shape[1])
            # Arguments after the value: dropout_p, is_causal.
            parts = [
                _OPS._scaled_dot_product_flash_attention_for_cpu(
                    query, _expand_keys(key_SKD[keys], query), _expand_keys(value_SKD[keys], query),
                    0.0, causal, scale=self.scale,
                )
                for keys, causal in _key_blocks(segment)
            ]  # fmt: skip
            out, lse = parts[0] if len(parts) == 1 else _merge_softmax(parts)
            _split_heads(out_THD[rows], key_SKD.shape[1]).copy_(out)
            _split_heads(lse_TH[rows, :, None], key_SKD.shape[1]).copy_(lse[..., None])
        return out_THD, lse_TH

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        query_THD, key_SKD, value_SKD, out_THD, lse_TH = saved
        heads = key_SKD.shape[1]
        # Zeros: segments of one document add to the gradients of the keys they share.
        grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in saved[:3])
        for segment in segments.segments:
            rows = slice(segment.first_query, segment.first_query + segment.n_queries)
            query, out, grad = (
                _split_heads(x[rows], heads) for x in (query_THD, out_THD, grad_THD)
            )
            lse = _split_heads(lse_TH[rows, :, None], heads)[..., 0]
            # With output and LSE of the whole segment, each block's probabilities come out
            # normalized over all keys, so the blocks' gradients add up.
            for keys, causal in _key_blocks(segment):
                key, value = (
                    _expand_keys(key_SKD[keys], query),
                    _expand_keys(value_SKD[keys], query),
                )
                block_grads = _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, query, key, value, out, lse, 0.0, causal, scale=self.scale
                )
                _split_heads(grads[0][rows], heads).add_(block_grads[0])
                for grad_SKD, part_GKSD in zip(grads[1:], block_grads[1:], strict=True):
                    grad_SKD[keys].add_(part_GKSD.sum(0).transpose(0, 1))
        return grads[0], grads[1], grads[2]


def _key_blocks(segment: AttentionSegment) -> list[tuple[slice, bool]]:
    """Return (keys, causal) of the rectangle of prefix keys, if any, and of the causal square."""
    # Two calls, as the CPU operator aligns its causal mask to the top left: right for squares only.
    own = segment.first_key + segment.n_prefix_keys
    square = (slice(own, segment.first_key + segment.n_keys), True)
    rectangle = (slice(segment.first_key, own), False)
    return [rectangle, square] if segment.n_prefix_keys else [square]


def _split_heads(rows_THD: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Return a view of (T, H, D) as (G, K, T, D): query heads by the key head they use."""
    return rows_THD.unflatten(1, (key_heads, -1)).permute(2, 1, 0, 3)


def _expand_keys(rows_SKD: torch.Tensor, query_GKTD: torch.Tensor) -> torch.Tensor:
    """Return (S, K, D) as (G, K, S, D), repeated by a stride of 0 and not in memory."""
    return rows_SKD.transpose(0, 1).expand(query_GKTD.shape[0], -1, -1, -1)


def _merge_softmax(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and LSE of attention over the keys of two blocks."""
    (first, first_lse), (second, second_lse) = parts
    lse = torch.logaddexp(first_lse, second_lse)
    # Both exponents are <= 0, so neither factor can overflow.
    left, right = ((block_lse - lse).exp()[..., None] for block_lse in (first_lse, second_lse))
    return first * left + second * right, lse


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """All segments in one call of torch's flash kernel; float16 and bfloat16 on CUDA."""

    scale: float

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the LSE, shape (H, T)."""
        varlen = segments.varlen(query_THD.device)
        out_THD, lse_HT, *_ = _OPS._flash_attention_forward(
            query_THD.contiguous(),
            _select_rows(key_SKD, varlen.key_rows),
            _select_rows(value_SKD, varlen.key_rows),
            varlen.query_offsets,
            varlen.key_offsets,
            varlen.max_queries,
            varlen.max_keys,
            0.0,  # dropout_p
            True,  # is_causal
            False,  # return_debug_mask
            scale=self.scale,
        )
        return out_THD, lse_HT

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        query_THD, key_SKD, value_SKD, out_THD, lse_HT = saved
        varlen = segments.varlen(query_THD.device)
        # Without dropout no random numbers are drawn, but the operator requires the RNG state.
        state = torch.zeros(2, dtype=torch.uint64, device=query_THD.device)
        grad_query, grad_key, grad_value = _OPS._flash_attention_backward(
            grad_THD.contiguous(),
            query_THD.contiguous(),
            _select_rows(key_SKD, varlen.key_rows),
            _select_rows(value_SKD, varlen.key_rows),
            out_THD,
            lse_HT,
            varlen.query_offsets,
            varlen.key_offsets,
            varlen.max_queries,
            varlen.max_keys,
            0.0,  # dropout_p
            True,  # is_causal
            state,
            torch.empty(0, device=query_THD.device),
            scale=self.scale,
        )
        grads = [_scatter_rows(part, key_SKD, varlen.key_rows) for part in (grad_key, grad_value)]
        return grad_query, grads[0], grads[1]


@dataclass(frozen=True, slots=True)
class EfficientKernel:
    """All segments in one call of the memory-efficient kernel; float32 as well, on CUDA.

    It does not support grouped-query attention, so key heads are repeated in memory.
    """

    scale: float

    def forward(
        self,
        query_THD: torch.Tensor,
        key_SKD: torch.Tensor,
        value_SKD: torch.Tensor,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and the LSE, padded to the longest segment."""
        varlen = segments.varlen(query_THD.device)
        groups = query_THD.shape[1] // key_SKD.shape[1]
        out, lse, *_ = _OPS._efficient_attention_forward(
            query_THD[None],
            _select_rows(key_SKD, varlen.key_rows).repeat_interleave(groups, 1)[None],
            _select_rows(value_SKD, varlen.key_rows).repeat_interleave(groups, 1)[None],
            None,  # attn_bias
            varlen.query_offsets,
            varlen.key_offsets,
            varlen.max_queries,
            varlen.max_keys,
            0.0,  # dropout_p
            _CAUSAL_FROM_BOTTOM_RIGHT,
            True,  # compute_log_sumexp
            scale=self.scale,
        )
        return out[0], lse

    def backward(
        self,
        grad_THD: torch.Tensor,
        saved: Saved,
        segments: AttentionSegments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        query_THD, key_SKD, value_SKD, out_THD, lse = saved
        varlen = segments.varlen(query_THD.device)
        groups = query_THD.shape[1] // key_SKD.shape[1]
        # Without dropout no random numbers are drawn, but the operator requires seed and offset.
        zero = torch.zeros((), dtype=torch.int64, device=query_THD.device)
        grad_query, *rest, _ = _OPS._efficient_attention_backward(
            grad_THD[None].contiguous(),
            query_THD[None],
            _select_rows(key_SKD, varlen.key_rows).repeat_interleave(groups, 1)[None],
            _select_rows(value_SKD, varlen.key_rows).repeat_interleave(groups, 1)[None],
            None,  # attn_bias
            out_THD[None],
            varlen.query_offsets,
            varlen.key_offsets,
            varlen.max_queries,
            varlen.max_keys,
            lse,
            0.0,  # dropout_p
            zero,
            zero,
            _CAUSAL_FROM_BOTTOM_RIGHT,
            False,  # bias_requires_grad
            scale=self.scale,
        )
        # repeat_interleave put the G copies of a key head side by side: their gradients add up.
        summed = [part[0].unflatten(1, (-1, groups)).sum(2) for part in rest]
        grads = [_scatter_rows(part, key_SKD, varlen.key_rows) for part in summed]
        return grad_query[0], grads[0], grads[1]


def _select_rows(rows_SKD: torch.Tensor, key_rows: torch.Tensor | None) -> torch.Tensor:
    return rows_SKD.contiguous() if key_rows is None else rows_SKD[key_rows]


def _scatter_rows(
    part: torch.Tensor, like_SKD: torch.Tensor, key_rows: torch.Tensor | None
) -> torch.Tensor:
    """Return gradients of the selected rows, summed where a row was selected more than once."""
    if key_rows is None:
        return part
    # index_add_ on CUDA adds in no fixed order. A row is in at most two segments (the front and
    # back span of a shard), and a sum of two floats does not depend on the order.
    return torch.zeros_like(like_SKD, memory_format=torch.contiguous_format).index_add_(
        0, key_rows, part
    )
