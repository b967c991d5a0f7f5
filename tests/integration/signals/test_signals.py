"""Gradient statistics of real models: the one pass gives what one pass per piece gives."""

from __future__ import annotations

import copy
import warnings
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
from raymix.training.model.loss import IGNORED, PackedLoss

K, LENGTH, VOCAB = 3, 12, 64
WIDTHS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
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
    tokens = (torch.randint(0, 5, (rows, LENGTH)) + 4 * group_B[:, None]) % VOCAB
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
    pieces = torch.cat([torch.arange(2 * K), torch.arange(0, 2 * K, 3), torch.tensor([-1, 4, -1])])
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


def checkpoint_activations(model: PackedLoss) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers is renaming it
        model.model.gradient_checkpointing_enable({"use_reentrant": False})


def assert_same(result: PieceGram, expected: PieceGram, *, rel: float = 1e-5) -> None:
    ours, theirs = statistics(result), statistics(expected)
    for name in ("loss_K", "tokens_K", "norm2_K", "noise_K"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=rel, atol=0)
    # Products of gradients that are nearly at right angles are small: as exact as the lengths are.
    length_K = np.sqrt(np.abs(theirs.norm2_K))
    scale_KK = np.maximum(np.abs(theirs.gram_KK), np.outer(length_K, length_K))
    np.testing.assert_array_less(np.abs(ours.gram_KK - theirs.gram_KK) / scale_KK, rel)
    np.testing.assert_array_equal(result.rows_P, expected.rows_P)


@pytest.fixture(scope="module")
def llama() -> PackedLoss:
    return language_model()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("pieces", [even(), uneven()], ids=["even", "uneven"])
def test_one_pass_equals_one_pass_per_piece(kind: str, pieces: torch.Tensor) -> None:
    model, rows = language_model(kind), rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    (result,) = measured(model, rows, pieces)
    assert_same(result, expected)
    assert not gradients(model)
    model(*rows)[0].backward()
    plain = gradients(model)
    result, ours = recorded(model, rows, pieces, scale=0.125)
    assert_same(result, expected)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(8 * ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how", ["checkpointing", "chunked head", "untied", "tiles", "two rows each"]
)
def test_every_way_to_run_gives_the_same(how: str, llama: PackedLoss) -> None:
    model = language_model(tie_word_embeddings=False) if how == "untied" else copy.deepcopy(llama)
    pieces = even(2) if how == "two rows each" else uneven()
    rows = rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    if how == "checkpointing":
        checkpoint_activations(model)
    if how == "chunked head":
        model = PackedLoss(model.model, linear_head=True, logit_bytes=0)  # 64 tokens at a time
    model(*rows)[0].backward()
    plain = gradients(model)
    options = {"tile_bytes": 3000} if how == "tiles" else {}
    (result,) = measured(model, rows, pieces, **options)
    assert_same(result, expected)
    result, ours = recorded(model, rows, pieces, **options)
    assert_same(result, expected)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_passes_add_up_to_unbiased_averages(llama: PackedLoss) -> None:
    pieces = even(3)
    rows = rows_of(pieces)
    result = measured(llama, rows, pieces, passes=3)
    assert [each.rows_P.tolist() for each in result] == 3 * [2 * K * [1.0]]
    for number, each in enumerate(result):
        own = torch.arange(number * 2 * K, (number + 1) * 2 * K)
        alone = measured(llama, tuple(part[own] for part in rows), pieces[own])
        assert_same(each, alone[0])
    whole, parts = statistics(measured(llama, rows, pieces)), statistics(result)
    np.testing.assert_allclose(parts.loss_K, whole.loss_K, rtol=1e-5)
    np.testing.assert_array_equal(parts.tokens_K, whole.tokens_K)


def test_pieces_of_one_row_fill_every_pass(llama: PackedLoss) -> None:
    result = measured(llama, rows_of(even()), even(), passes=2 * K)
    assert [int(each.rows_P.sum()) for each in result] == 2 * K * [1]
    assert sum(each.rows_P for each in result).tolist() == 2 * K * [1.0]


def test_a_missing_half_or_group_is_nan_and_nothing_else(llama: PackedLoss) -> None:
    pieces = even(2)
    pieces = pieces[(pieces % K != 2) & (pieces != 1)]  # group 2, and the first half of group 1
    (result,) = measured(llama, rows_of(pieces), pieces)
    (expected,) = measured(llama, rows_of(pieces), pieces, mode="backward")
    assert_nan = np.testing.assert_array_equal
    stats, theirs = statistics(result), statistics(expected)
    assert_nan(np.flatnonzero(np.isnan(stats.loss_K)), [2])
    assert_nan(np.flatnonzero(np.isnan(stats.norm2_K)), [1, 2])
    assert_nan(np.flatnonzero(np.isnan(stats.noise_K)), [1, 2])
    missing = np.zeros((K, K), dtype=bool)
    missing[2], missing[:, 2], missing[1, 1] = True, True, True
    assert_nan(np.isnan(stats.gram_KK), missing)
    np.testing.assert_allclose(stats.gram_KK, theirs.gram_KK, rtol=1e-4)


def test_alignment_is_the_explicit_dot_product(llama: PackedLoss) -> None:
    pieces = assign_pieces(torch.arange(K).repeat(4), n_groups=K)
    rows = batch(torch.arange(K).repeat(4))
    (result,) = measured(llama, rows, pieces)
    flat = []
    for group in (1, 2):
        own = pieces % K == group
        loss, _ = llama(*(part[own] for part in rows))
        (loss / (rows[2][own] >= 0).sum()).backward()
        flat.append(torch.cat([grad.flatten() for grad in gradients(llama).values()]))
    alignment = statistics(result).gram_KK[:, 2]
    assert alignment[1] == pytest.approx(float(flat[0] @ flat[1]), rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_preconditioned_products_are_explicit(tied: bool) -> None:
    model = language_model(tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pieces = uneven()
    rows = rows_of(pieces)
    metric = adam_preconditioner(optimizer)
    assert all(metric(parameter) is None for parameter in model.parameters())
    model(*rows)[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    flat = []
    for piece in (1, 3):
        own = pieces == piece
        model(*(part[own] for part in rows))[0].backward()
        moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
        flat.append(
            torch.cat(
                [
                    (grad / ((moments[name] / (1 - 0.999)).sqrt() + 1e-8).sqrt()).flatten()
                    for name, grad in gradients(model).items()
                ]
            )
        )
    expected = torch.stack(flat) @ torch.stack(flat).T
    for result in (
        *measured(model, rows, pieces, precondition=metric),
        *measured(model, rows, pieces, mode="backward", precondition=metric),
        recorded(model, rows, pieces, precondition=metric)[0],
    ):
        ours = torch.from_numpy(result.gram_PP[np.ix_([1, 3], [1, 3])])
        torch.testing.assert_close(
            ours.float(), expected, rtol=1e-4, atol=1e-4 * float(expected.max())
        )


def test_the_last_layer_is_the_head_alone(llama: PackedLoss) -> None:
    model = language_model(tie_word_embeddings=False)
    pieces = uneven()
    rows = rows_of(pieces)
    head = model.model.get_output_embeddings().weight
    flat = []
    for piece in (0, 4):
        own = pieces == piece
        model(*(part[own] for part in rows))[0].backward()
        flat.append(head.grad.flatten().clone())
        model.zero_grad()
    (result,) = measured(model, rows, pieces, mode="last_layer")
    assert result.gram_PP[0, 4] == pytest.approx(float(flat[0] @ flat[1]), rel=1e-4)
    model(*rows)[0].backward()
    plain = gradients(model)
    result, ours = recorded(model, rows, pieces, mode="last_layer")
    assert result.gram_PP[0, 4] == pytest.approx(float(flat[0] @ flat[1]), rel=1e-4)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_do_not_count() -> None:
    model = language_model("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn" not in name and "ln_f" not in name)
    pieces = even()
    rows = rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    assert_same(measured(model, rows, pieces)[0], expected)
    assert_same(recorded(model, rows, pieces)[0], expected)


def test_bf16_is_nearly_the_same(llama: PackedLoss) -> None:
    pieces = even(2)
    rows = rows_of(pieces)
    (expected,) = measured(llama, rows, pieces)
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = measured(llama, rows, pieces)
        probe = GradientProbe(llama, n_groups=K)
        with probe.recording(pieces) as recording:
            loss, _ = llama(*rows)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    assert {grad.dtype for grad in gradients(llama).values()} == {torch.float32}
    for each in (result, recording.pieces):
        assert each.gram_PP.dtype == np.float64
        np.testing.assert_allclose(
            np.diagonal(each.gram_PP), np.diagonal(expected.gram_PP), rtol=0.05
        )
    np.testing.assert_allclose(result.gram_PP, recording.pieces.gram_PP, rtol=1e-2, atol=1e-2)


class Odd(nn.Module):
    """A loss module that uses a parameter as asked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        options = {"max_norm": {"max_norm": 0.5}, "by frequency": {"scale_grad_by_freq": True}}
        self.table = nn.Embedding(VOCAB, 8, **options.get(how, {}))
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, VOCAB)

    def forward(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, labels_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(tokens_BL)
        if self.how == "einsum":
            x = torch.einsum("blh,hk->blk", x, self.mix)
        elif self.how == "twice":
            x = functional.linear(torch.tanh(functional.linear(x, self.mix)), self.mix)
        loss_N = functional.cross_entropy(
            self.head(x).flatten(0, 1), labels_BL.flatten(), reduction="none", ignore_index=IGNORED
        )
        return loss_N.sum(), loss_N.detach().view(labels_BL.shape)


@pytest.mark.parametrize(
    ("how", "reason"), [("max_norm", "max_norm"), ("by frequency", "scale_grad_by_freq")]
)
def test_what_cannot_be_split_is_named(how: str, reason: str) -> None:
    model, pieces = Odd(how), even()
    rows = rows_of(pieces)
    with pytest.raises(TrainingError, match=rf"'table.weight'.*{reason}.*mode 'backward'"):
        measured(model, rows, pieces)
    with pytest.raises(TrainingError, match=reason):
        recorded(model, rows, pieces)
    assert np.isfinite(statistics(measured(model, rows, pieces, mode="backward")).norm2_K).all()
    model(*rows)[0].backward()  # and nothing is left behind
    assert gradients(model)


def test_a_loss_module_that_uses_a_parameter_itself_runs_again_as_a_whole() -> None:
    model, pieces = Odd("einsum"), uneven()
    rows = rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    assert_same(measured(model, rows, pieces)[0], expected)
    model(*rows)[0].backward()
    plain = gradients(model)
    result, ours = recorded(model, rows, pieces, scale=0.5)
    assert_same(result, expected)
    torch.testing.assert_close(2 * ours["mix"], plain["mix"])


def test_a_parameter_used_twice_counts_once() -> None:
    model, pieces = Odd("twice"), uneven()
    rows = rows_of(pieces)
    (expected,) = measured(model, rows, pieces, mode="backward")
    assert_same(measured(model, rows, pieces)[0], expected)
    model(*rows)[0].backward()
    plain = gradients(model)
    result, ours = recorded(model, rows, pieces)
    assert_same(result, expected)
    torch.testing.assert_close(ours["mix"], plain["mix"])


def test_wrong_use_says_so(llama: PackedLoss) -> None:
    rows = rows_of(even())
    probe = GradientProbe(llama, n_groups=K)
    for wrong in (torch.tensor([2 * K]), torch.tensor([-2]), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="piece_B"), probe.recording(wrong):
            pass
    with pytest.raises(ValueError, match="passes"):
        probe.measure(*rows, even(), passes=0)
    with pytest.raises(ValueError, match="6 rows"), probe.recording(even()[:3]):
        llama(*rows)
    with probe.recording(even()):
        llama(*rows)
        with pytest.raises(ValueError, match="second forward"):
            llama(*rows)
    with probe.recording(even()) as recording:
        pass
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = recording.pieces
    with pytest.raises(ValueError, match="measure"):
        recorded(llama, rows, even(), mode="backward")
    for options in ({"n_groups": 0}, {"n_groups": 2, "halves": 0}, {"n_groups": 2, "mode": "x"}):
        with pytest.raises(ValueError, match="must be"):
            GradientProbe(llama, **options)
    with pytest.raises(ValueError, match="trainable"):
        GradientProbe(nn.Identity(), n_groups=1)


def test_rows_take_turns_and_are_put_in_order() -> None:
    groups = torch.tensor([1, 0, -1, 1, 1, 0, 2])
    pieces = assign_pieces(groups, n_groups=3)
    assert pieces.tolist() == [1, 0, -1, 4, 1, 3, 2]
    order = order_by_piece(pieces)
    assert sorted(order.tolist()) == list(range(7))
    assert pieces[order].tolist() == [-1, 0, 2, 3, 4, 1, 1]  # equal counts side by side
