"""Numerics of the simplex: shares in log space, projection to limits, water-filling.

Axes: A weighted domains, or groups of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Curvature below this part of the largest cost counts as none: 1 / curvature would overflow.
_FLAT_CURVATURE = 1e-13
_SMALLEST_SHARE = 1e-300


def log_of(share_A: Floats) -> Floats:
    """Return logarithms, shape (A,); minus infinity for 0."""
    # log(0) = -inf is meant: such a domain stays at 0 under any multiplicative update.
    with np.errstate(divide="ignore"):
        return np.log(share_A)


def log_normalized(log_A: Floats) -> Floats:
    """Return log weights shifted so that the weights sum to 1, shape (A,)."""
    # The largest is taken out first, so that no exponential overflows.
    top = log_A.max()
    return log_A - (top + np.log(np.exp(log_A - top).sum()))


def softmax(log_A: Floats) -> Floats:
    """Return weights in proportion to exp(log_A), summing to 1, shape (A,)."""
    scaled_A = np.exp(log_A - log_A.max())
    return scaled_A / scaled_A.sum()


def within(target_A: Floats, low_A: Floats, high_A: Floats) -> Floats:
    """Return clip(c x target, low, high) with the c that makes it sum to 1, shape (A,).

    Among the shares within the limits it is the one nearest to `target` in relative entropy. The
    limits must be feasible: the low ones sum to at most 1, the high ones to at least 1.
    """
    if ((low_A <= target_A) & (target_A <= high_A)).all():
        return target_A
    target_A = np.maximum(target_A, _SMALLEST_SHARE)
    # The sum grows with c, so bisection on log c finds it; 100 halvings are beyond float64.
    low, high = np.log(_SMALLEST_SHARE), -np.log(_SMALLEST_SHARE)
    for _ in range(100):
        middle = (low + high) / 2
        total = np.clip(target_A * np.exp(middle), low_A, high_A).sum()
        low, high = (middle, high) if total < 1 else (low, middle)
        if high - low < 1e-14:
            break
    return np.clip(target_A * np.exp(high), low_A, high_A)


def water_fill(linear_A: Floats, curve_A: Floats) -> Floats:
    """Return the shares that minimize sum(linear x w + curve x w ** 2 / 2), shape (A,).

    Problem (9) of PiKE. The optimum is w = max(0, (level - linear) / curve) for one level, found
    by sorting. A domain without curvature takes all that is left once the level reaches it; the
    cheapest ones share it.

    Args:
        linear_A: Linear costs, shape (A,).
        curve_A: Curvatures, >= 0, shape (A,).
    """
    # Only differences of linear costs matter: adding a constant to all changes no optimum.
    size = max(float(np.ptp(linear_A)), float(curve_A.max()))
    flat_A = curve_A <= _FLAT_CURVATURE * size
    if size == 0:
        return np.full(linear_A.size, 1 / linear_A.size)
    share_A = np.zeros(linear_A.size)
    cheapest = float(linear_A[flat_A].min()) if flat_A.any() else np.inf
    # A curved domain dearer than the cheapest flat one gets nothing: that one takes any amount.
    curved = np.flatnonzero(~flat_A & (linear_A < cheapest))
    order = curved[np.argsort(linear_A[curved], kind="stable")]
    # Offsets from the smallest cost: sums of large equal costs would drown their differences.
    base = float(linear_A[order[0]]) if order.size else 0.0
    cost_A, width_A = linear_A[order] - base, 1 / curve_A[order]
    levels = (1 + np.cumsum(cost_A * width_A)) / np.cumsum(width_A)
    ends = np.append(cost_A[1:], cheapest - base)
    # The first level that stays below the next domain's cost: domains beyond it stay empty.
    filled = np.flatnonzero(levels <= ends)
    level = float(levels[filled[0]]) if filled.size else cheapest - base
    share_A[order] = np.maximum(level - cost_A, 0) * width_A
    if not filled.size:  # the curved ones take less than everything; flat ones share the rest
        ties_A = flat_A & (linear_A == cheapest)
        share_A[ties_A] = max(0.0, 1 - share_A.sum()) / ties_A.sum()
    return share_A / share_A.sum()
