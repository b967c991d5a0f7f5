"""The exact optimum of a sum of powers of single shares: BiMix at a horizon.

Minimize sum_i K_i (r_i + e_i)^-a_i over shares within floors and caps. The sum is convex, and at
its optimum every domain between its bounds has the same slope l:

    r_i(l) = clip((a_i K_i / l)^(1 / (1 + a_i)) - e_i, floor_i, cap_i),    sum_i r_i(l) = 1.

The left side falls in l, so one root in log l is all there is to find. The same l makes the
Lagrangian dual, which bounds the optimum from below: the gap is proved, not assumed.

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
    """Losses scale (r_own + offset)^-exponent, one for each of V targets."""

    scale_V: Floats
    """In units of the loss, shape (V,)."""
    exponent_V: Floats
    """Shape (V,)."""
    own_V: NDArray[np.int64]
    """Index of the domain whose share counts, shape (V,)."""
    offset: float
    """Added to shares."""


@runtime_checkable
class HasPowers(Protocol):
    """A law that may be powers of single shares."""

    def powers(self, step: float | None = None) -> Powers | None:
        """Return them at a step (left out: the table's last), or None if it is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeparableOptimum:
    """The best shares of a sum of powers."""

    share_D: Floats
    """Within the limits, summing to 1, shape (D,)."""
    value: float
    """Of the sum."""
    gap: float
    """No allowed shares have a value more than this below `value`."""


def separable_optimum(
    scale_D: Floats, exponent_D: Floats, region: Region, *, offset_D: Floats | None = None
) -> SeparableOptimum:
    """Return the shares that minimize sum_i scale_i (r_i + offset_i)^-exponent_i.

    Domains without a scale or exponent change nothing: they get their floors, and what the caps
    of all others leave over.

    Args:
        scale_D: K, the weighted scales at the horizon, >= 0, shape (D,), in units of the loss.
        exponent_D: Exponents, >= 0, shape (D,).
        region: Floors and caps of the D domains.
        offset_D: What is added to the shares, >= 0, shape (D,); nothing where left out.

    Raises:
        LawError: If a number is negative or not finite, or a domain whose loss would be infinite
            without a share is capped at 0.
    """
    powers = _Terms(scale_D, exponent_D, np.zeros(scale_D.size) if offset_D is None else offset_D)
    powers.check(region)
    felt_D, low_D, high_D = powers.felt_D, region.low_A, region.high_A
    capped_D = np.where(felt_D, high_D, low_D)
    if capped_D.sum() <= 1:  # all that counts is at its cap
        return SeparableOptimum(
            share_D=region.vertex(np.where(felt_D, -1.0, 0.0)),
            value=float(powers.cost(high_D).sum()),
            gap=0.0,
        )
    log_slope = _root(powers, region)
    held_D = powers.at_slope(log_slope, region)
    share_D = _summing_to_one(held_D, powers, region)
    # f(r) less the dual at l, term by term: they differ only by what the last rounding moved.
    moved_D = powers.cost(share_D) - powers.cost(held_D) + np.exp(log_slope) * (share_D - held_D)
    value = float(powers.cost(share_D).sum())
    return SeparableOptimum(share_D=share_D, value=value, gap=max(float(moved_D.sum()), 0.0))


class _Terms:
    """The terms K (r + e)^-a."""

    def __init__(self, scale_D: Floats, exponent_D: Floats, offset_D: Floats) -> None:
        self.scale_D, self.exponent_D, self.offset_D = scale_D, exponent_D, offset_D
        self.felt_D = (scale_D > 0) & (exponent_D > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            self._log_D = np.log(scale_D) + np.log(exponent_D)

    def check(self, region: Region) -> None:
        """Refuse numbers that no law has."""
        given = {"scale": self.scale_D, "exponent": self.exponent_D, "offset": self.offset_D}
        for name, number_D in given.items():
            bad = np.flatnonzero(~((number_D >= 0) & np.isfinite(number_D)))
            if bad.size:
                where, value = f"law.{name}[{bad[0]}]", float(number_D[bad[0]])
                raise LawError.at(
                    where, value, "not allowed", allowed="Allowed: a finite number of at least 0"
                )
        shut = np.flatnonzero(self.felt_D & (region.high_A + self.offset_D <= 0))
        if shut.size:
            raise LawError.at(
                f"objective.caps[{shut[0]}]",
                0.0,
                "the law predicts an infinite loss without a share",
                fix="Raise the cap",
            )

    def cost(self, share_D: Floats) -> Floats:
        """Return each term, shape (D,)."""
        base_D = np.where(self.felt_D, share_D + self.offset_D, 1.0)
        return self.scale_D * base_D**-self.exponent_D

    def at_slope(self, log_slope: float, region: Region) -> Floats:
        """Return r(l), shape (D,): it falls in l."""
        log_D = (self._log_D - log_slope) / (1 + self.exponent_D)
        # Above 1 any share is clipped to its cap, so exp need not overflow.
        share_D = np.exp(np.minimum(log_D, 1.0)) - self.offset_D
        return np.clip(share_D, region.low_A, region.high_A)

    def log_slope(self, share_D: Floats) -> Floats:
        """Return the log of minus each term's slope, shape (D,); only where it is felt."""
        base_D = np.where(self.felt_D, share_D + self.offset_D, 1.0)
        return self._log_D - (1 + self.exponent_D) * np.log(base_D)


def _root(powers: _Terms, region: Region) -> float:
    """Return log l at which the shares sum to 1."""

    def excess(log_slope: float) -> float:
        return float(powers.at_slope(log_slope, region).sum()) - 1.0

    # At `low` every share is at its cap; at `high` none is above its floor and an equal part of
    # what the floors leave.
    spare = max(1 - float(region.low_A.sum()), 0.0) / region.low_A.size
    low = float(powers.log_slope(region.high_A)[powers.felt_D].min())
    near_D = np.maximum(region.low_A + spare, 1e-300)
    high = float(powers.log_slope(near_D)[powers.felt_D].max())
    low, high = low - 1e-9 * (1 + abs(low)), high + 1e-9 * (1 + abs(high))
    if excess(high) >= 0:  # the floors are all there is
        return high
    root: Any = brentq(excess, low, high, xtol=1e-14, rtol=4 * np.finfo(float).eps)
    return float(root)


def _summing_to_one(share_D: Floats, powers: _Terms, region: Region) -> Floats:
    """Return shares with the last rounding of the root spread as a step of the root would."""
    free_D = powers.felt_D & (share_D > region.low_A) & (share_D < region.high_A)
    if free_D.any():
        part_D = np.where(free_D, (share_D + powers.offset_D) / (1 + powers.exponent_D), 0.0)
        share_D = share_D + (1 - share_D.sum()) * part_D / part_D.sum()
    return np.clip(share_D, region.low_A, region.high_A)
