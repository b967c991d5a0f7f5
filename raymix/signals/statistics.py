"""From inner products of piece gradients to unbiased statistics per group; numpy only.

A piece is a part ("half") of one group's sequences; products of *different* halves are free of
the noise that both share with themselves. Letters: K groups, M halves, P = M * K pieces, piece
`half * K + group`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceGram:
    """What one rank measured in one pass, piece by piece."""

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
    """What passes and ranks add up to; `statistics` turns it into averages.

    Every field is a sum, so sums of ranks are the sums of the run: add them with `+`, or send
    `vector()` through one all-reduce.
    """

    nats_K: Floats
    """Summed loss, shape (K,)."""
    labels_K: Floats
    """Label tokens, shape (K,)."""
    rows_K: Floats
    """Sequences, shape (K,)."""
    gram_KK: Floats
    """Inner products of summed gradients, shape (K, K); on the diagonal of different halves."""
    weight_KK: Floats
    """What divides `gram_KK`: products of label tokens, shape (K, K)."""
    spread_K: Floats
    """Squared distances of the halves' mean gradients, each an estimate of the noise, (K,)."""
    pairs_K: Floats
    """How many such estimates `spread_K` adds up, shape (K,)."""

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
        """Return the sums of nothing."""
        return cls.from_vector(np.zeros(5 * n_groups + 2 * n_groups**2), n_groups)

    def vector(self) -> Floats:
        """Return all sums as one vector of length 5 K + 2 K^2."""
        return np.concatenate([np.ravel(getattr(self, field.name)) for field in fields(self)])

    @classmethod
    def from_vector(cls, vector: Floats, n_groups: int) -> GradientSums:
        """Return the sums that `vector()` wrote down."""
        values: dict[str, Floats] = {}
        at = 0
        for field in fields(cls):
            shape = (n_groups,) * (2 if field.name.endswith("_KK") else 1)
            size = n_groups ** len(shape)
            values[field.name] = vector[at : at + size].reshape(shape).astype(np.float64)
            at += size
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStats:
    """Averages per group; NaN where the rows at hand say nothing."""

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

    So the mean gradient of r sequences has variance `noise / r`: the sigma squared of PiKE's eq.
    8 for a loss that is the mean over tokens, whatever the number of sequences per half.
    """
    gram_KK: Floats
    """Inner products of the groups' mean gradients, shape (K, K), with `norm2_K` on the diagonal.

    A column is the alignment of all groups with one of them, a target for example.
    """


def gradient_sums(pieces: PieceGram) -> GradientSums:
    """Return one pass' inner products as sums that may be added over passes and ranks."""
    K, P = pieces.n_groups, len(pieces.labels_P)
    M = P // K
    gram_MKMK = pieces.gram_PP.reshape(M, K, M, K)
    labels_MK, rows_MK = pieces.labels_P.reshape(M, K), pieces.rows_P.reshape(M, K)
    weight_MKMK = labels_MK[:, :, None, None] * labels_MK
    # A half has noise in common with itself only, so groups may meet in any halves, but a group
    # meets itself in different halves.
    own = np.eye(M, dtype=bool)[:, None, :, None] & np.eye(K, dtype=bool)[None, :, None, :]
    spread_K, pairs_K = _spread(gram_MKMK, labels_MK, rows_MK)
    return GradientSums(
        nats_K=pieces.nats_P.reshape(M, K).sum(0),
        labels_K=labels_MK.sum(0),
        rows_K=rows_MK.sum(0),
        gram_KK=np.where(own, 0.0, gram_MKMK).sum((0, 2)),
        weight_KK=np.where(own, 0.0, weight_MKMK).sum((0, 2)),
        spread_K=spread_K,
        pairs_K=pairs_K,
    )


def _spread(gram_MKMK: Floats, labels_MK: Floats, rows_MK: Floats) -> tuple[Floats, Floats]:
    """Return the sum of the noise estimates of all pairs of halves, and how many there are.

    With noise s per sequence, E |g_a - g_b|^2 = s (1 / r_a + 1 / r_b) for mean gradients g of
    r_a and r_b sequences; the standard variance estimate where all halves are equal.
    """
    M, K = labels_MK.shape
    spread_K, pairs_K = np.zeros(K), np.zeros(K)
    k = np.arange(K)
    for a in range(M):
        for b in range(a):
            both = (labels_MK[a] > 0) & (labels_MK[b] > 0)
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

    Passes count by their label tokens. A group without labels has NaN everywhere, one with
    labels in a single half has NaN for `norm2_K` and `noise_K`; nothing else is touched.
    """
    sums = measured if isinstance(measured, GradientSums) else _added(measured)
    gram_KK = _ratio(sums.gram_KK, sums.weight_KK)
    return GradientStats(
        loss_K=_ratio(sums.nats_K, sums.labels_K),
        tokens_K=sums.labels_K,
        norm2_K=np.diagonal(gram_KK).copy(),
        noise_K=_ratio(sums.spread_K, sums.pairs_K),
        gram_KK=gram_KK,
    )


def _added(measured: PieceGram | Iterable[PieceGram]) -> GradientSums:
    passes = [measured] if isinstance(measured, PieceGram) else list(measured)
    if not passes:
        raise ValueError("statistics of no passes at all")
    total = gradient_sums(passes[0])
    for further in passes[1:]:
        total += gradient_sums(further)
    return total


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
