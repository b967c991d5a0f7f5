"""Unbiased gradient statistics per group from inner products of piece gradients; numpy only.

A piece is a part ("half") of one group's sequences. The noise of different halves is independent,
so their inner product is an unbiased estimate of a squared norm, which that of a half with itself
is not. Legend: K groups, M halves, P = M * K pieces, piece `half * K + group`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceGram:
    """Sums per piece of one pass on one rank."""

    n_groups: int
    gram_PP: Floats
    """Inner products of the pieces' gradients of the *summed* loss, shape (P, P), nats squared."""
    nats_P: Floats
    """Summed loss, shape (P,)."""
    labels_P: Floats
    """Label tokens, shape (P,)."""
    rows_P: Floats
    """Sequences, shape (P,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSums:
    """Sums over passes and ranks; `statistics` computes averages from them.

    Every field is a sum: add those of ranks with `+`, or all-reduce `vector()` once.
    """

    nats_K: Floats
    """Summed loss, shape (K,)."""
    labels_K: Floats
    """Label tokens, shape (K,)."""
    rows_K: Floats
    """Sequences, shape (K,)."""
    gram_KK: Floats
    """Inner products of summed gradients, shape (K, K); the diagonal is of different halves."""
    weight_KK: Floats
    """Divisor of `gram_KK`: products of label tokens, shape (K, K)."""
    spread_K: Floats
    """Sum of the noise estimates of pairs of halves, shape (K,)."""
    pairs_K: Floats
    """Number of those pairs, shape (K,)."""

    def __add__(self, other: GradientSums) -> GradientSums:
        """Return the sums of both."""
        return GradientSums(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )

    @classmethod
    def zeros(cls, n_groups: int) -> GradientSums:
        """Return sums that are zero."""
        return cls.from_vector(np.zeros(5 * n_groups + 2 * n_groups**2), n_groups)

    def vector(self) -> Floats:
        """Return all sums as one vector of length 5 K + 2 K^2."""
        return np.concatenate([np.ravel(getattr(self, field.name)) for field in fields(self)])

    @classmethod
    def from_vector(cls, vector: Floats, n_groups: int) -> GradientSums:
        """Return the sums of a `vector()`."""
        # The suffix of a field's name is its shape, which keeps the order in one place.
        values: dict[str, Floats] = {}
        begin = 0
        for field in fields(cls):
            shape = (n_groups,) * (2 if field.name.endswith("_KK") else 1)
            size = n_groups ** len(shape)
            values[field.name] = vector[begin : begin + size].reshape(shape).astype(np.float64)
            begin += size
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStats:
    """Averages per group; NaN where the measured rows do not determine them."""

    loss_K: Floats
    """Mean loss, nats per label token, shape (K,)."""
    tokens_K: Floats
    """Label tokens, shape (K,)."""
    norm2_K: Floats
    """Squared norm of the gradient of the mean loss, shape (K,).

    Unbiased, from products of different halves; noise can make it negative.
    """
    noise_K: Floats
    """Trace of the covariance over sequences of a sequence's mean gradient per token, (K,).

    The mean gradient of r sequences has variance `noise / r`: the sigma squared of PiKE's eq. 8 for
    a loss that is the mean over tokens, independent of the number of sequences per half.
    """
    gram_KK: Floats
    """Inner products of the groups' mean gradients, shape (K, K), with `norm2_K` on the diagonal.

    A column is the alignment of all groups with one group, for example a target.
    """


def gradient_sums(pieces: PieceGram) -> GradientSums:
    """Return the inner products of one pass as sums that add over passes and ranks."""
    K, P = pieces.n_groups, len(pieces.labels_P)
    M = P // K
    gram_MKMK = pieces.gram_PP.reshape(M, K, M, K)
    labels_MK, rows_MK = pieces.labels_P.reshape(M, K), pieces.rows_P.reshape(M, K)
    weight_MKMK = labels_MK[:, :, None, None] * labels_MK
    # Only the product of a piece with itself is biased by noise: different groups have independent
    # noise in any halves, a group has it in different halves.
    same_piece = np.eye(M, dtype=bool)[:, None, :, None] & np.eye(K, dtype=bool)[None, :, None, :]
    spread_K, pairs_K = _spread(gram_MKMK, labels_MK, rows_MK)
    return GradientSums(
        nats_K=pieces.nats_P.reshape(M, K).sum(0),
        labels_K=labels_MK.sum(0),
        rows_K=rows_MK.sum(0),
        gram_KK=np.where(same_piece, 0.0, gram_MKMK).sum((0, 2)),
        weight_KK=np.where(same_piece, 0.0, weight_MKMK).sum((0, 2)),
        spread_K=spread_K,
        pairs_K=pairs_K,
    )


def _spread(gram_MKMK: Floats, labels_MK: Floats, rows_MK: Floats) -> tuple[Floats, Floats]:
    """Return the sum of the noise estimates of all pairs of halves, and their number, (K,) each.

    With noise s per sequence, E |g_a - g_b|^2 = s (1 / r_a + 1 / r_b) for mean gradients g of
    r_a and r_b sequences; with equal halves it is the standard variance estimate.
    """
    M, K = labels_MK.shape
    spread_K, pairs_K = np.zeros(K), np.zeros(K)
    k = np.arange(K)
    for a in range(M):
        for b in range(a):
            both = (labels_MK[a] > 0) & (labels_MK[b] > 0)
            # 1.0 in place of empty halves: no division by zero, and np.where drops the value.
            n_a, n_b = np.where(both, labels_MK[[a, b]], 1.0)
            r_a, r_b = np.where(both, rows_MK[[a, b]], 1.0)
            distance2 = (
                gram_MKMK[a, k, a, k] / n_a**2
                + gram_MKMK[b, k, b, k] / n_b**2
                - (gram_MKMK[a, k, b, k] + gram_MKMK[b, k, a, k]) / (n_a * n_b)
            )
            spread_K += np.where(both, distance2 * r_a * r_b / (r_a + r_b), 0.0)
            pairs_K += both
    return spread_K, pairs_K


def statistics(measured: GradientSums | PieceGram | Iterable[PieceGram]) -> GradientStats:
    """Return the statistics of sums, or of one or more passes.

    Passes are weighted by their label tokens. A group without labels has NaN in all fields, one
    with labels in a single half has NaN in `norm2_K` and `noise_K`; other groups are unaffected.
    """
    sums = measured if isinstance(measured, GradientSums) else _sum_passes(measured)
    gram_KK = _divide(sums.gram_KK, sums.weight_KK)
    return GradientStats(
        loss_K=_divide(sums.nats_K, sums.labels_K),
        tokens_K=sums.labels_K,
        # A copy: diagonal returns a read-only view.
        norm2_K=np.diagonal(gram_KK).copy(),
        noise_K=_divide(sums.spread_K, sums.pairs_K),
        gram_KK=gram_KK,
    )


def _sum_passes(measured: PieceGram | Iterable[PieceGram]) -> GradientSums:
    passes = [measured] if isinstance(measured, PieceGram) else list(measured)
    if not passes:
        raise ValueError("no passes to compute statistics of")
    # Per pass: inner products of rows in different passes were not measured.
    total = gradient_sums(passes[0])
    for piece_gram in passes[1:]:
        total += gradient_sums(piece_gram)
    return total


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    # `where` and not 0 / 0, which warns, and an infinite loss stays infinite.
    return np.divide(
        numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0
    )
