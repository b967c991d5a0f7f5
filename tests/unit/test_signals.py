"""Gradient statistics of real models: the one pass gives what one pass per piece gives."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from raymix.errors import TrainingError
from raymix.signals import (
    GradientProbe,
    PieceGram,
    adam_preconditioner,
    assign_pieces,
    order_by_piece,
    statistics,
)
from raymix.train.loss import IGNORED, PackedLoss

K, LENGTH, VOCAB = 8, 12, 64
WIDTHS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **WIDTHS,
        "intermediate_size": 24,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**WIDTHS, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    "mistral": {**WIDTHS, "intermediate_size": 24, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH},
}
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def language_model(kind: str = "llama", **changes: Any) -> PackedLoss:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **{**FAMILIES[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).train()
    for module in model.modules():  # no dropout: two passes must agree
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():  # biases and norms that do something
        parameter.data += 0.05 * torch.randn_like(parameter)
    return PackedLoss(model, linear_head=True)


def batch(group_B: torch.Tensor, *, seed: int = 0) -> Batch:
    """Return rows of two documents each, whose tokens tell the groups apart."""
    torch.manual_seed(seed)
    rows = len(group_B)
    tokens = (torch.randint(0, VOCAB // 2, (rows, LENGTH)) + 4 * group_B[:, None]) % VOCAB
    positions = (torch.arange(LENGTH) % 7).repeat(rows, 1)
    labels = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    labels[:, 6] = IGNORED
    labels[torch.rand(rows, LENGTH) < 0.1] = IGNORED
    return tokens, positions, labels


def even(rows_per_piece: int = 1) -> torch.Tensor:
    return torch.arange(2 * K).repeat(rows_per_piece)


def uneven() -> torch.Tensor:
    """Return pieces of one to three rows in no order, some rows of none."""
    generator = torch.Generator().manual_seed(3)
    pieces = torch.cat([torch.arange(2 * K), torch.arange(0, 2 * K, 3), torch.tensor([-1, 6, -1])])
    return pieces[torch.randperm(len(pieces), generator=generator)]


def rows_of(piece_B: torch.Tensor) -> Batch:
    return batch(piece_B.clamp(min=0) % K)


def measured(
    model: nn.Module, rows: Batch, piece_B: torch.Tensor, **options: Any
) -> tuple[PieceGram, ...]:
    passes = options.pop("passes", 1)
    return GradientProbe(model, n_groups=K, **options).measure(*rows, piece_B, passes=passes)


def recorded(
    model: nn.Module, rows: Batch, piece_B: torch.Tensor, *, scale: float = 1.0, **options: Any
) -> tuple[PieceGram, dict[str, torch.Tensor]]:
    probe = GradientProbe(model, n_groups=K, **options)
    with probe.recording(piece_B, scale=scale) as recording:
        (model(*rows)[0] * scale).backward()
    return recording.pieces, gradients(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return named


def assert_same(found: PieceGram, expected: PieceGram, *, rel: float = 1e-5) -> None:
    ours, theirs = statistics(found), statistics(expected)
    for name in ("loss_K", "tokens_K", "norm2_K", "noise_K"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=rel, atol=0)
    # Products of gradients that are nearly at right angles are small: as exact as the lengths are.
    length_K = np.sqrt(np.abs(theirs.norm2_K))
    scale_KK = np.maximum(np.abs(theirs.gram_KK), np.outer(length_K, length_K))
    np.testing.assert_array_less(np.abs(ours.gram_KK - theirs.gram_KK) / scale_KK, rel)
    np.testing.assert_array_equal(found.rows_P, expected.rows_P)


@pytest.fixture(scope="module")
def llama() -> PackedLoss:
    return language_model()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("pieces", [even(), uneven()], ids=["even", "uneven"])
def test_one_pass_equals_one_pass_per_piece(kind: str, pieces: torch.Tensor) -> None:
    model, rows = language_model(kind), rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    (found,) = measured(model, rows, pieces)
    assert_same(found, expected)
    assert not gradients(model)
    model(*rows)[0].backward()
    plain = gradients(model)
    found, ours = recorded(model, rows, pieces, scale=0.125)
    assert_same(found, expected)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(8 * ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["checkpointing", "chunked head", "untied", "two halves of one"])
def test_every_way_to_run_gives_the_same(how: str, llama: PackedLoss) -> None:
    model = language_model(tie_word_embeddings=False) if how == "untied" else copy.deepcopy(llama)
    pieces = even(2) if how == "two halves of one" else uneven()
    rows = rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    if how == "checkpointing":
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "chunked head":
        model = PackedLoss(model.model, linear_head=True, logit_bytes=0)  # 64 tokens at a time
    model(*rows)[0].backward()
    plain = gradients(model)
    (found,) = measured(model, rows, pieces)
    assert_same(found, expected)
    found, ours = recorded(model, rows, pieces)
    assert_same(found, expected)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
