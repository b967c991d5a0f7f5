"""Power laws fitted to many learning curves at once: loss(n) = floor + scale x n ** -power.

Axes: H points in time, M curves, G powers of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raymix.mixers.adaptive.simplex import Floats

MAX_POWER = 0.8
"""Largest power (ADO)."""
HUBER = 1e-3
"""Residual of the log loss beyond which it counts by its size, not its square (ADO)."""

_POWERS = np.linspace(0.0125, MAX_POWER, 64)
# Reweighting converges in three or four rounds on real curves.
_ROUNDS = 4
# Powers between neighbors of the grid, tried once the best grid power is known.
_FINE = np.linspace(-1, 1, 9) * (_POWERS[1] - _POWERS[0])


@dataclass(frozen=True, slots=True, eq=False)
class PowerLaws:
    """M fitted curves; NaN where there was too little to fit."""

    floor_M: Floats
    """Loss at infinity, >= 0, shape (M,)."""
    scale_M: Floats
    """Reducible loss at n = 1, >= 0, shape (M,)."""
    power_M: Floats
    """Powers, shape (M,)."""

    def loss(self, n: float) -> Floats:
        """Return the losses at `n`, shape (M,)."""
        return self.floor_M + self.scale_M * n**-self.power_M

    def slope(self, n: float) -> Floats:
        """Return how fast the losses fall at `n`, in loss per unit of n, shape (M,)."""
        return self.power_M * self.scale_M * n**-self.power_M / n


def fit_power_laws(n_H: Floats, loss_HM: Floats) -> PowerLaws:
    """Return the laws that fit curves best in the log of the loss, by Huber's measure.

    Floor and scale have a closed form for each power on a grid, so all curves are fitted at once:
    least squares, reweighted a few times toward Huber's measure, then powers between those of the
    grid. Curves with fewer than three points get NaN.

    Args:
        n_H: Where the losses were seen, > 0, shape (H,).
        loss_HM: Losses, > 0, NaN where there is none, shape (H, M).
    """
    seen_HM = np.isfinite(loss_HM) & (loss_HM > 0)
    loss_HM = np.where(seen_HM, loss_HM, 1.0)
    # Powers of n / max(n) stay within float64; the scale is converted back at the end.
    unit = float(n_H.max())
    log_H = np.log(n_H / unit)
    # 1 / loss ** 2 makes a squared error of the loss one of the log loss, to first order.
    base_HM = seen_HM / loss_HM**2
    weight_HM = base_HM
    coarse = np.exp(-_POWERS[:, None] * log_H)
    best_M = np.zeros(loss_HM.shape[1], np.intp)
    for _ in range(_ROUNDS):
        cost_GM, floor_GM, scale_GM = _lines(*_sums(coarse, weight_HM, loss_HM))
        best_M = cost_GM.argmin(axis=0)
        floor_M, scale_M = (np.take_along_axis(x, best_M[None], 0)[0] for x in (floor_GM, scale_GM))
        curve_HM = floor_M + scale_M * coarse[best_M].T
        off_HM = np.abs(np.log(np.maximum(curve_HM, 1e-12) / loss_HM))
        weight_HM = base_HM * np.minimum(1, HUBER / np.maximum(off_HM, HUBER))
    # A power of 0 could not be told from the floor.
    power_GM = np.clip(_POWERS[best_M] + _FINE[:, None], 1e-3, MAX_POWER)
    fine_GHM = np.exp(-power_GM[:, None, :] * log_H[:, None])
    cost_GM, floor_GM, scale_GM = _lines(*_sums(fine_GHM, weight_HM, loss_HM))
    best = cost_GM.argmin(axis=0)[None]
    floor_M, scale_M, power_M = (
        # Two points determine no curve of three parameters.
        np.where(seen_HM.sum(axis=0) >= 3, np.take_along_axis(x, best, 0)[0], np.nan)
        for x in (floor_GM, scale_GM, power_GM)
    )
    return PowerLaws(floor_M, scale_M * unit**power_M, power_M)


def _sums(z: Floats, weight_HM: Floats, loss_HM: Floats) -> tuple[Floats, ...]:
    """Return the weighted sums of 1, z, z z, L, z L and L L over time; z is (G, H) or (G, H, M)."""
    times = "gh,hm->gm" if z.ndim == 2 else "ghm,hm->gm"
    weighted_loss_HM = weight_HM * loss_HM
    return (
        weight_HM.sum(axis=0),
        np.einsum(times, z, weight_HM, optimize=True),
        np.einsum(times, z * z, weight_HM, optimize=True),
        weighted_loss_HM.sum(axis=0),
        np.einsum(times, z, weighted_loss_HM, optimize=True),
        (weighted_loss_HM * loss_HM).sum(axis=0),
    )


def _lines(
    w_M: Floats, z_GM: Floats, zz_GM: Floats, l_M: Floats, zl_GM: Floats, ll_M: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return cost, floor and scale, both >= 0, of the best line L = floor + scale x z, (G, M)."""
    # 1e-300 keeps curves with too few points finite; they become NaN later.
    spread_GM = np.maximum(w_M * zz_GM - z_GM**2, 1e-300)
    scale_GM = np.maximum((w_M * zl_GM - z_GM * l_M) / spread_GM, 0)
    floor_GM = (l_M - scale_GM * z_GM) / np.maximum(w_M, 1e-300)
    # A loss below 0 at infinity is impossible: refit those through floor 0.
    below_GM = floor_GM < 0
    scale_GM = np.where(below_GM, zl_GM / np.maximum(zz_GM, 1e-300), scale_GM)
    floor_GM = np.where(below_GM, 0.0, floor_GM)
    squares = floor_GM**2 * w_M + 2 * floor_GM * scale_GM * z_GM + scale_GM**2 * zz_GM
    cost_GM = ll_M - 2 * floor_GM * l_M - 2 * scale_GM * zl_GM + squares
    return cost_GM, floor_GM, scale_GM
