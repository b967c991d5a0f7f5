"""Exact optimum of a sum of powers of single shares: BiMix at a horizon.

Minimize sum_i K_i (r_i + e_i)^-a_i over shares within floors and caps. The sum is convex, and at
its optimum every domain between its bounds has the same slope l:

    r_i(l) = clip((a_i K_i / l)^(1 / (1 + a_i)) - e_i, floor_i, cap_i),    sum_i r_i(l) = 1.

The left side decreases in l, so the problem reduces to one root in log l. The Lagrangian dual at
the same l bounds the optimum from below and proves the gap.

Shapes: D domains, V targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from raymix.errors import LawError
from raymix.laws.search.feasible import Region
from raymix.laws.table import Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Powers:
    """Losses scale (r_own + offset)^-exponent of V targets."""

    scale_V: Floats
    """Scales in units of the loss, shape (V,)."""
    exponent_V: Floats
    """Exponents, shape (V,)."""
    own_V: NDArray[np.int64]
    """Index of each target's own domain, shape (V,)."""
    offset: float
    """Offset of the shares, >= 0."""


@runtime_checkable
class HasPowers(Protocol):
    """A law whose losses may be powers of single shares."""

    def powers(self, step: float | None = None) -> Powers | None:
        """Return the powers at a step, default the table's last; None for other formulas."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeparableOptimum:
    """The best shares of a sum of powers."""

    share_D: Floats
    """Shares within the limits, summing to 1, shape (D,)."""
    value: float
    """Value of the sum."""
    gap: float
    """No allowed shares have a value more than this below `value`."""


def separable_optimum(
    scale_D: Floats, exponent_D: Floats, region: Region, *, offset_D: Floats | None = None
) -> SeparableOptimum:
    """Return the shares that minimize sum_i scale_i (r_i + offset_i)^-exponent_i.

    Domains with scale or exponent 0 have no effect: they get their floors, and the share that the
    caps of the others leave.

    Args:
        scale_D: K, the weighted scales at the horizon, >= 0, shape (D,), in units of the loss.
        exponent_D: Exponents, >= 0, shape (D,).
        region: Floors and caps of the D domains.
        offset_D: Offsets of the shares, >= 0, shape (D,); default: 0.

    Raises:
        LawError: If a number is negative or not finite, or a domain whose loss would be infinite
            without a share is capped at 0.
    """
    powers = _Terms(scale_D, exponent_D, np.zeros(scale_D.size) if offset_D is None else offset_D)
    powers.check(region)
    active_D, low_D, high_D = powers.active_D, region.low_A, region.high_A
    saturated_D = np.where(active_D, high_D, low_D)
    # All active domains fit at their caps: the multiplier l is 0 and log l has no root.
    if saturated_D.sum() <= 1:
        return SeparableOptimum(
            share_D=region.vertex(np.where(active_D, -1.0, 0.0)),
            value=float(powers.cost(high_D).sum()),
            gap=0.0,
        )
    log_slope = _root(powers, region)
    root_share_D = powers.shares_at_slope(log_slope, region)
    share_D = _summing_to_one(root_share_D, powers, region)
    # f(r) minus the dual at l, summed term by term: they differ only by the last rounding, which
    # the difference of two sums would lose.
    excess_D = (
        powers.cost(share_D)
        - powers.cost(root_share_D)
        + np.exp(log_slope) * (share_D - root_share_D)
    )
    value = float(powers.cost(share_D).sum())
    return SeparableOptimum(share_D=share_D, value=value, gap=max(float(excess_D.sum()), 0.0))


class _Terms:
    """The terms K (r + e)^-a."""

    def __init__(self, scale_D: Floats, exponent_D: Floats, offset_D: Floats) -> None:
        self.scale_D, self.exponent_D, self.offset_D = scale_D, exponent_D, offset_D
        self.active_D = (scale_D > 0) & (exponent_D > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            self._log_D = np.log(scale_D) + np.log(exponent_D)

    def check(self, region: Region) -> None:
        """Check that all numbers are finite and >= 0, and that no loss is infinite at its cap."""
        given = {"scale": self.scale_D, "exponent": self.exponent_D, "offset": self.offset_D}
        for name, number_D in given.items():
            invalid = np.flatnonzero(~((number_D >= 0) & np.isfinite(number_D)))
            if invalid.size:
                where, value = f"law.{name}[{invalid[0]}]", float(number_D[invalid[0]])
                raise LawError.at(
                    where, value, "not allowed", allowed="Allowed: a finite number of at least 0"
                )
        capped = np.flatnonzero(self.active_D & (region.high_A + self.offset_D <= 0))
        if capped.size:
            raise LawError.at(
                f"objective.caps[{capped[0]}]",
                0.0,
                "the law predicts an infinite loss without a share",
                fix="Raise the cap",
            )

    def cost(self, share_D: Floats) -> Floats:
        """Return each term, shape (D,)."""
        base_D = np.where(self.active_D, share_D + self.offset_D, 1.0)
        return self.scale_D * base_D**-self.exponent_D

    def shares_at_slope(self, log_slope: float, region: Region) -> Floats:
        """Return r(l), shape (D,), decreasing in l."""
        log_D = (self._log_D - log_slope) / (1 + self.exponent_D)
        # Above 1 any share is clipped to its cap, so exp need not overflow.
        share_D = np.exp(np.minimum(log_D, 1.0)) - self.offset_D
        return np.clip(share_D, region.low_A, region.high_A)

    def log_slope(self, share_D: Floats) -> Floats:
        """Return the log of minus each term's slope, shape (D,); only valid for active domains."""
        base_D = np.where(self.active_D, share_D + self.offset_D, 1.0)
        return self._log_D - (1 + self.exponent_D) * np.log(base_D)


def _root(powers: _Terms, region: Region) -> float:
    """Return log l at which the shares sum to 1."""

    def excess(log_slope: float) -> float:
        return float(powers.shares_at_slope(log_slope, region).sum()) - 1.0

    # At `low` every share is at its cap; at `high` none is above its floor and an equal part of
    # what the floors leave.
    equal_part = max(1 - float(region.low_A.sum()), 0.0) / region.low_A.size
    low = float(powers.log_slope(region.high_A)[powers.active_D].min())
    interior_D = np.maximum(region.low_A + equal_part, 1e-300)
    high = float(powers.log_slope(interior_D)[powers.active_D].max())
    low, high = low - 1e-9 * (1 + abs(low)), high + 1e-9 * (1 + abs(high))
    # The floors sum to 1: no root, and any large slope gives the floors.
    if excess(high) >= 0:
        return high
    root: Any = brentq(excess, low, high, xtol=1e-14, rtol=4 * np.finfo(float).eps)
    return float(root)


def _summing_to_one(share_D: Floats, powers: _Terms, region: Region) -> Floats:
    """Return shares that sum to 1, with the root's rounding error spread over the free domains."""
    # In proportion to dr/d(log l) = -(r + e) / (1 + a), as one more Newton step of the root.
    free_D = powers.active_D & (share_D > region.low_A) & (share_D < region.high_A)
    if free_D.any():
        part_D = np.where(free_D, (share_D + powers.offset_D) / (1 + powers.exponent_D), 0.0)
        share_D = share_D + (1 - share_D.sum()) * part_D / part_D.sum()
    return np.clip(share_D, region.low_A, region.high_A)
