"""The weights of the worst rows: the dual of one minimax step.

Shapes: A domains that may have a share, K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raymix.laws.search.feasible import Region
from raymix.laws.table import Floats

_MAX_NEWTON = 30
_MAX_SHRINKS = 40
_SHRINK = 0.03
_INEXACT = 1e-2
_LEAST = 1e-15


@dataclass(frozen=True, slots=True, eq=False)
class BalanceResult:
    """The best answer of the shares to weights q."""

    value: float
    """psi(q) = min_s [sum_k q_k level_k(s) + entropies], relative to the point of the model."""
    share_A: Floats
    """The shares s that have it, shape (A,)."""
    level_K: Floats
    """Levels of the rows there, relative as the value is, shape (K,): the slope of psi."""


def balanced(
    reply: Callable[[Floats], BalanceResult],
    slope_KA: Floats,
    region: Region,
    sigma: float,
    start_K: Floats,
) -> tuple[Floats, Floats]:
    """Return the weights q, shape (K,), that maximize psi, and the shares that answer them.

    psi is concave, its slope is the levels, and its curvature -(G C G^T) / sigma with C the
    covariance of the shares between their limits. A barrier mu sum log q keeps q inside; Newton
    steps follow its maximum inwards until it can cost no more than a hundredth of the decrease
    that the step promises.

    Args:
        reply: The best answer to weights.
        slope_KA: G, the slopes of the rows, shape (K, A).
        region: Limits of the shares.
        sigma: Weight of all entropies together, > 0.
        start_K: Weights to begin near, shape (K,).
    """
    n_rows = start_K.size
    q_K = 0.99 * start_K + 0.01 / n_rows
    now = reply(q_K)
    mu = max(float(now.level_K.max() - q_K @ now.level_K) / n_rows, _LEAST)
    for _ in range(_MAX_SHRINKS):
        q_K, now = _centred(reply, q_K, now, mu, (slope_KA, region, sigma))
        if mu * n_rows <= max(-_INEXACT * now.value, _LEAST):
            break
        mu *= _SHRINK
    return q_K, now.share_A


def _centred(
    reply: Callable[[Floats], BalanceResult],
    q_K: Floats,
    now: BalanceResult,
    mu: float,
    model: tuple[Floats, Region, float],
) -> tuple[Floats, BalanceResult]:
    """Return the weights that maximize psi(q) + mu sum log q, and the answer to them."""
    for _ in range(_MAX_NEWTON):
        step_K = _newton(q_K, now, mu, *model)
        slope = float((now.level_K + mu / q_K) @ step_K)
        if slope <= 1e-2 * mu:
            break
        size = min(1.0, 0.99 / max(float((-step_K / q_K).max()), 1e-300))
        before = now.value
        while size > 1e-4:
            trial_K = q_K + size * step_K
            trial_K /= trial_K.sum()
            new = reply(trial_K)
            gained = new.value - before + mu * float(np.log(trial_K / q_K).sum())
            if gained >= 1e-4 * size * slope:
                break
            size /= 4
        else:
            break
        q_K, now = trial_K, new
    return q_K, now


def _newton(
    q_K: Floats, now: BalanceResult, mu: float, slope_KA: Floats, region: Region, sigma: float
) -> Floats:
    """Return the Newton step of psi(q) + mu sum log q among weights that sum to 1."""
    share_A = now.share_A
    part_A = np.where((share_A > region.low_A) & (share_A < region.high_A), share_A, 0.0)
    total = float(part_A.sum())
    mean_K = slope_KA @ part_A / total if total else np.zeros(q_K.size)
    centerd_KA = slope_KA - mean_K[:, None]
    hessian_KK = (centerd_KA * part_A) @ centerd_KA.T / sigma
    # In units of q, so that weights of very different sizes keep the system well conditioned.
    scaled_KK = hessian_KK * q_K[:, None] * q_K + mu * np.eye(q_K.size)
    both = np.linalg.solve(scaled_KK, np.stack([q_K * now.level_K + mu, q_K], axis=1))
    along = float(q_K @ both[:, 0]) / float(q_K @ both[:, 1])
    return q_K * (both[:, 0] - along * both[:, 1])
