"""Gradient statistics on a CUDA device: the numbers of the CPU, and bf16 close to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raymix.recipe import ConfigModel
from raymix.signals import GradientProbe, PieceGram, assign_pieces, order_by_piece, statistics
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import IGNORED, PackedLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

K, LENGTH, VOCAB = 4, 32, 128
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def model() -> PackedLoss:
    built = build_model(ConfigModel(config=CONFIG), CorpusFacts(VOCAB, 0, LENGTH), seed=1)
    return PackedLoss(built, linear_head=True)


def rows() -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    torch.manual_seed(0)
    group_B = torch.arange(K).repeat(7)
    piece_B = assign_pieces(group_B, n_groups=K)
    order = order_by_piece(piece_B)
    piece_B, group_B = piece_B[order], group_B[order]
    tokens = (torch.randint(0, 20, (len(group_B), LENGTH)) + 20 * group_B[:, None]) % VOCAB
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    return (tokens, torch.arange(LENGTH).repeat(len(tokens), 1), labels), piece_B


def recorded(loss: PackedLoss, device: str, *, bf16: bool = False) -> PieceGram:
    loss = loss.to(device)
    batch, piece_B = rows()
    probe = GradientProbe(loss, n_groups=K)
    with probe.recording(piece_B.to(device)) as recording:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            nats, _ = loss(*(part.to(device) for part in batch))
        nats.backward()
    loss.zero_grad(set_to_none=True)
    return recording.pieces


@pytest.mark.parametrize("how", ["plain", "checkpointed", "chunked head", "compiled"])
def test_fp32_is_as_on_the_cpu(how: str) -> None:
    loss = model()
    expected = statistics(recorded(loss, "cpu"))
    if how == "checkpointed":
        loss.model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "chunked head":
        loss = PackedLoss(loss.model, linear_head=True, logit_bytes=0)
    if how == "compiled":
        loss.compile()
    actual = statistics(recorded(loss, "cuda"))
    for name in ("loss_K", "norm2_K", "noise_K", "gram_KK"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-3)


def test_bf16_is_close() -> None:
    loss = model()
    expected = statistics(recorded(loss, "cpu"))
    actual = statistics(recorded(loss, "cuda", bf16=True))
    for name in ("loss_K", "norm2_K", "noise_K"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=0.05)


def test_a_batch_of_its_own_leaves_no_gradients() -> None:
    loss = model()
    expected = statistics(recorded(loss, "cpu"))
    loss = loss.cuda()
    batch, piece_B = rows()
    probe = GradientProbe(loss, n_groups=K)
    actual = statistics(probe.measure(*(part.cuda() for part in batch), piece_B.cuda()))
    np.testing.assert_allclose(actual.norm2_K, expected.norm2_K, rtol=1e-3)
    assert all(parameter.grad is None for parameter in loss.parameters())
