"""Attention over segments on a CUDA device: the kernels' numbers are those of a dense mask."""

from __future__ import annotations

import pytest
import torch

from raymix.context_parallel import ContextParallelGroups, DocumentPart, LocalShards, attention
from raymix.context_parallel.kernels import EfficientKernel, FlashKernel, Kernel, kernel_for
from raymix.context_parallel.segments import AttentionSegment, AttentionSegments
from tests.support.attention import Case, dense_attention, random_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_local_documents_are_attended_to_one_by_one(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, 1)
    rows, grad = case.rows(torch.float64)
    for part in rows:
        part.requires_grad_()
    expected = dense_attention(rows, case.lengths)
    expected_grads = torch.autograd.grad(expected, rows, grad)
    own = tuple(part.detach().to("cuda", dtype).requires_grad_() for part in rows)
    shards = LocalShards(
        [DocumentPart(length, (0,)) for length in case.lengths], 0, ContextParallelGroups()
    )
    out = attention(own[0], own[1], own[2], shards)
    grads = torch.autograd.grad(out, own, grad.to("cuda", dtype))
    for tensor, right in zip((out, *grads), (expected, *expected_grads), strict=True):
        error = (tensor.double().cpu() - right).abs().max()
        assert float(error) < TOLERANCE[dtype] * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(FlashKernel(0.3), torch.bfloat16), (EfficientKernel(0.3), torch.float32)],
)
def test_segments_may_share_keys(kernel: Kernel, dtype: torch.dtype) -> None:
    """A shard: the front of a document of 40 tokens and its back, with the keys before each."""
    case = Case((40,), ((0,),), 4, 2, 16)
    rows, grad = case.rows(torch.float64)
    for part in rows:
        part.requires_grad_()
    at = torch.cat([torch.arange(10, 20), torch.arange(30, 37)])
    whole = dense_attention(rows, [40], scale=0.3)
    expected = torch.autograd.grad(whole[at], rows, grad[at])
    query, key, value = (part.detach().to("cuda", dtype) for part in rows)
    segments = AttentionSegments([AttentionSegment(0, 10, 0, 20), AttentionSegment(10, 7, 0, 37)])
    own = query[at.cuda()]
    out, lse = kernel.forward(own, key, value, segments)
    grads = kernel.backward(grad[at].to("cuda", dtype), (own, key, value, out, lse), segments)
    pairs = [(out, whole[at]), (grads[0], expected[0][at])]
    pairs += list(zip(grads[1:], expected[1:], strict=True))
    for tensor, right in pairs:
        error = (tensor.double().cpu() - right).abs().max()
        assert float(error) < TOLERANCE[dtype] * max(1.0, float(right.abs().max()))


def test_half_precision_takes_the_flash_kernel() -> None:
    half = torch.zeros(3, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert isinstance(kernel_for(half.float(), 1.0), EfficientKernel)
    assert isinstance(kernel_for(half[..., :60], 1.0), EfficientKernel)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert isinstance(kernel_for(half, 1.0), FlashKernel)
