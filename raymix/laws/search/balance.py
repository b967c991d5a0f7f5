"""Dual of one minimax step: the weights of the rows, by a barrier method.

Shapes: A domains with a cap above 0, K rows of the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raymix.laws.search.feasible import Region
from raymix.laws.table import Floats

_MAX_NEWTON = 30
_MAX_SHRINKS = 40
_SHRINK_FACTOR = 0.03
# Error of the dual relative to the decrease that the step promises: the outer descent checks the
# objective itself, so more digits would be wasted.
_RELATIVE_INEXACTNESS = 1e-2
# Levels are relative to the objective's scale; below this the barrier is lost in their rounding.
_MIN_BARRIER = 1e-15


@dataclass(frozen=True, slots=True, eq=False)
class DualPoint:
    """The dual function psi at weights q, and the shares that attain its minimum."""

    value: float
    """psi(q) = min_s [sum_k q_k level_k(s) + entropies], relative to the point of the model."""
    share_A: Floats
    """The minimizing shares s, shape (A,)."""
    level_K: Floats
    """Levels of the rows at s, relative to the same point, shape (K,): the gradient of psi."""


def maximize_dual(
    best_response: Callable[[Floats], DualPoint],
    slope_KA: Floats,
    region: Region,
    sigma: float,
    start_K: Floats,
) -> tuple[Floats, Floats]:
    """Return the weights q, shape (K,), that maximize psi, and the minimizing shares.

    psi is concave with gradient `level_K` and Hessian -(G C G^T) / sigma, with C the covariance of
    the shares strictly between their limits. A barrier mu sum log q keeps q positive; Newton steps
    follow the maximum as mu shrinks, until the barrier costs at most a hundredth of the decrease
    that the step promises.

    Args:
        best_response: Evaluates psi at weights, shape (K,).
        slope_KA: G, the slopes of the rows, shape (K, A).
        region: Limits of the shares.
        sigma: Total weight of the entropies, > 0.
        start_K: Starting weights, shape (K,).
    """
    n_rows = start_K.size
    # The last weights may be 0, where the barrier is infinite.
    q_K = 0.99 * start_K + 0.01 / n_rows
    point = best_response(q_K)
    mu = max(float(point.level_K.max() - q_K @ point.level_K) / n_rows, _MIN_BARRIER)
    for _ in range(_MAX_SHRINKS):
        q_K, point = _center(best_response, q_K, point, mu, (slope_KA, region, sigma))
        # At the barrier's maximum the duality gap is K mu.
        if mu * n_rows <= max(-_RELATIVE_INEXACTNESS * point.value, _MIN_BARRIER):
            break
        mu *= _SHRINK_FACTOR
    return q_K, point.share_A


def _center(
    best_response: Callable[[Floats], DualPoint],
    q_K: Floats,
    point: DualPoint,
    mu: float,
    dual_model: tuple[Floats, Region, float],
) -> tuple[Floats, DualPoint]:
    """Return the weights that maximize psi(q) + mu sum log q, and psi there."""
    for _ in range(_MAX_NEWTON):
        step_K = _newton_step(q_K, point, mu, *dual_model)
        slope = float((point.level_K + mu / q_K) @ step_K)
        if slope <= 1e-2 * mu:
            break
        # At most 99 % of the way to the nearest weight of 0, for the log's sake.
        size = min(1.0, 0.99 / max(float((-step_K / q_K).max()), 1e-300))
        value = point.value
        while size > 1e-4:
            trial_K = q_K + size * step_K
            trial_K /= trial_K.sum()  # the step keeps the sum but for rounding
            trial = best_response(trial_K)
            gain = trial.value - value + mu * float(np.log(trial_K / q_K).sum())
            if gain >= 1e-4 * size * slope:
                break
            size /= 4
        else:
            break
        q_K, point = trial_K, trial
    return q_K, point


def _newton_step(
    q_K: Floats, point: DualPoint, mu: float, slope_KA: Floats, region: Region, sigma: float
) -> Floats:
    """Return the Newton step of psi(q) + mu sum log q among weights that sum to 1."""
    share_A = point.share_A
    # Shares at a limit do not move with q. The others move as a softmax, whose covariance is
    # diag(s) - s s' / sum(s).
    free_share_A = np.where((share_A > region.low_A) & (share_A < region.high_A), share_A, 0.0)
    total = float(free_share_A.sum())
    mean_K = slope_KA @ free_share_A / total if total else np.zeros(q_K.size)
    centered_KA = slope_KA - mean_K[:, None]
    hessian_KK = (centered_KA * free_share_A) @ centered_KA.T / sigma
    # In units of q, so that weights of different magnitudes leave the system well conditioned.
    scaled_KK = hessian_KK * q_K[:, None] * q_K + mu * np.eye(q_K.size)
    solved_K2 = np.linalg.solve(scaled_KK, np.stack([q_K * point.level_K + mu, q_K], axis=1))
    multiplier = float(q_K @ solved_K2[:, 0]) / float(q_K @ solved_K2[:, 1])
    return q_K * (solved_K2[:, 0] - multiplier * solved_K2[:, 1])
