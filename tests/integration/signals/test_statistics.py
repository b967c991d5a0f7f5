"""Estimators of squared norms, noise and alignment, where the answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raymix.signals import (
    GradientProbe,
    GradientSums,
    PieceGram,
    assign_pieces,
    gradient_sums,
    statistics,
)

WIDTH = 50
TRUE = 0.396
"""The squared norm of the true gradient."""


class Linear(nn.Module):
    """Loss `theta @ x` of rows x ~ N(mean, I): a row's gradient is x, its noise WIDTH."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1, bias=False)

    def forward(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, labels_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_B1 = self.layer(tokens_BL)
        return loss_B1.sum(), loss_B1.detach()


def rows(rng: np.random.Generator, means_KW: np.ndarray, each: int) -> torch.Tensor:
    group_B = np.repeat(np.arange(len(means_KW)), each)
    return torch.from_numpy(means_KW[group_B] + rng.normal(size=(len(group_B), WIDTH)))


def draws(each: int, halves: int, count: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return norms, noises and products of two groups, and of the first the naive norm."""
    rng = np.random.default_rng(0)
    means_KW = rng.normal(size=(2, WIDTH))
    means_KW *= np.sqrt(TRUE) / np.linalg.norm(means_KW, axis=1, keepdims=True)
    model = Linear().double()
    probe = GradientProbe(model, n_groups=2, halves=halves)
    piece_B = assign_pieces(torch.arange(2).repeat_interleave(each), n_groups=2, halves=halves)
    norms, noises, products = [], [], []
    for _ in range(count):
        x = rows(rng, means_KW, each)
        labels = torch.ones(len(x), 1, dtype=torch.int64)
        (pieces,) = probe.measure(x, x, labels, piece_B)
        stats = statistics(pieces)
        norms.append(stats.norm2_K)
        noises.append(stats.noise_K)
        own = pieces.gram_PP.reshape(halves, 2, halves, 2)[:, 0, :, 0]
        products.append([stats.gram_KK[0, 1] - means_KW[0] @ means_KW[1], own.sum() / each**2])
    return np.array(norms), np.array(noises), np.array(products)


@pytest.mark.parametrize("halves", [2, 4])
def test_norms_are_unbiased_where_naive_ones_are_not(halves: int) -> None:
    norms, noises, products = draws(each=32, halves=halves)
    for values, truth in ((norms, TRUE), (noises, WIDTH), (products[:, :1], 0.0)):
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        np.testing.assert_array_less(np.abs(values.mean(0) - truth), 3 * error)
    assert products[:, 1].mean() > 4 * TRUE  # |mean gradient|^2: about TRUE + WIDTH / 32


def test_noise_does_not_depend_on_the_rows_per_half() -> None:
    noises = [draws(each=each, halves=2, count=100)[1].mean() for each in (4, 16, 64)]
    np.testing.assert_allclose(noises, WIDTH, rtol=0.06)


def pieces_of(
    rng: np.random.Generator, groups: int, halves: int, *, empty: tuple[int, ...] = ()
) -> PieceGram:
    P = groups * halves
    rows_P = rng.integers(1, 5, P).astype(float)
    rows_P[list(empty)] = 0
    labels_P = rows_P * rng.integers(5, 9, P)
    grads_PX = rng.normal(size=(P, 7)) * labels_P[:, None]
    return PieceGram(
        n_groups=groups,
        gram_PP=grads_PX @ grads_PX.T,
        nats_P=labels_P * rng.random(P),
        labels_P=labels_P,
        rows_P=rows_P,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_sums_travel_and_add_up(groups: int, halves: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (pieces_of(rng, groups, halves, empty=(rng.integers(groups),)) for _ in range(2))
    both = gradient_sums(one) + gradient_sums(other) + GradientSums.zeros(groups)
    sent = GradientSums.from_vector(both.vector(), groups)
    for name in ("loss_K", "tokens_K", "norm2_K", "noise_K", "gram_KK"):
        own = getattr(statistics([one, other]), name)
        np.testing.assert_array_equal(own, getattr(statistics(sent), name))
        assert own.shape == (groups,) * (2 if name == "gram_KK" else 1)
    np.testing.assert_allclose(both.gram_KK, both.gram_KK.T)


@pytest.mark.parametrize("halves", [2, 3])
def test_equal_halves_give_the_textbook_estimates(halves: int) -> None:
    """V = [sum |g_i|^2 - m |mean|^2] / (m - 1), noise = s V, norm = |mean|^2 - V / m."""
    rng = np.random.default_rng(5)
    rows_each, labels = 4.0, 40.0
    grads_MX = rng.normal(size=(halves, 7)) + 1
    mean_X = grads_MX.mean(0)
    variance = ((grads_MX**2).sum() - halves * mean_X @ mean_X) / (halves - 1)
    ones = np.ones(halves)
    stats = statistics(
        PieceGram(
            n_groups=1,
            gram_PP=labels**2 * grads_MX @ grads_MX.T,
            nats_P=2 * labels * ones,
            labels_P=labels * ones,
            rows_P=rows_each * ones,
        )
    )
    assert stats.loss_K == [2.0]
    assert stats.noise_K == pytest.approx([rows_each * variance])
    assert stats.norm2_K == pytest.approx([mean_X @ mean_X - variance / halves])


def test_one_half_shows_alignment_but_neither_norm_nor_noise() -> None:
    stats = statistics(pieces_of(np.random.default_rng(0), 3, 1))
    assert np.isnan(stats.norm2_K).all()
    assert np.isnan(stats.noise_K).all()
    assert np.isfinite(stats.gram_KK[~np.eye(3, dtype=bool)]).all()


def test_what_is_not_a_number_stays_in_its_group() -> None:
    pieces = pieces_of(np.random.default_rng(1), 3, 2)
    pieces.gram_PP[1], pieces.gram_PP[:, 1], pieces.nats_P[1] = np.nan, np.nan, np.inf
    stats = statistics(pieces)
    assert np.flatnonzero(~np.isfinite(stats.loss_K)).tolist() == [1]
    assert np.flatnonzero(np.isnan(stats.norm2_K)).tolist() == [1]
    assert np.isfinite(stats.gram_KK[np.ix_([0, 2], [0, 2])]).all()


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no passes"):
        statistics([])
