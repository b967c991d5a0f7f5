"""Many curves fitted at once: robust least squares in the log of the loss, with priors.

A *curve* is a formula with a Jacobian. Targets, folds, starts and bootstrap draws are one batch of
Levenberg-Marquardt: what they share is the rows, what they differ in is the weight of each row.
The measure is the posterior mode: squared residuals of the log loss over their scale, plus squared
distances of the coefficients from what is usual, over how much they vary. With few runs the prior
keeps coefficients that nothing was measured of where they do no harm; with many it has no voice.
Outliers count less by Student's t with four degrees of freedom, by reweighting; the scale of the
noise is the median of studentized residuals. Shapes: B problems, N rows, P coefficients, D domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raymix.laws.table import Floats

DEGREES = 4.0
"""Of freedom, of the noise."""
FIRST_SCALE = 0.01
"""Of the noise in the log loss, before any residual is known."""
_MIN_SCALE = 1e-5
_LARGEST_STEP = 2.0
_CONVERGED = 1e-9
_STEPS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a curve is evaluated at."""

    share_ND: Floats
    """Shares, >= 0, shape (N, D)."""
    log_step_N: Floats
    """Log of steps over the unit of the fit, shape (N,); zeros without steps."""

    def rows(self, chosen_N: np.ndarray) -> Inputs:
        """Return some of the rows."""
        return Inputs(self.share_ND[chosen_N], self.log_step_N[chosen_N])


class Curve(Protocol):
    """A formula for the log loss, with its derivatives."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the P coefficients, as they enter the fit."""
        ...

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P).

        Problem b is about target b modulo V; `at_B` says which problems these are, if not all.
        """
        ...

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return means, shape (B, P), and standard deviations, shape (P,), of coefficients."""
        ...

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return where to start from, each of shape (B, P)."""
        ...

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """B fitted curves."""

    theta_BP: Floats
    mean_BP: Floats
    """Of the prior."""
    sd_P: Floats
    """Of the prior."""
    weight_BN: Floats
    """One over the scale of each row's noise, outliers taken into account; 0: not used."""
    scale_B: Floats
    """Of the noise in the log loss."""
    cost_B: Floats
    """Half the sum of squares that was minimized."""

    def part(self, chosen: slice) -> Fitted:
        """Return some of the curves."""
        rest = (self.weight_BN[chosen], self.scale_B[chosen], self.cost_B[chosen])
        return Fitted(self.theta_BP[chosen], self.mean_BP[chosen], self.sd_P, *rest)

    def times(self, count: int) -> Fitted:
        """Return all curves, `count` times over."""
        rest = (np.tile(self.weight_BN, (count, 1)), np.tile(self.scale_B, count))
        theta_BP, mean_BP = (np.tile(part, (count, 1)) for part in (self.theta_BP, self.mean_BP))
        return Fitted(theta_BP, mean_BP, self.sd_P, *rest, np.tile(self.cost_B, count))


def fit_curves(
    curve: Curve,
    inputs: Inputs,
    log_loss_BN: Floats,
    use_BN: Floats,
    *,
    like: Fitted | None = None,
    rounds: int = 2,
) -> Fitted:
    """Return B fitted curves.

    Args:
        curve: The formula.
        inputs: The N rows.
        log_loss_BN: Log losses; those not used may be NaN.
        use_BN: Weight of each row in each problem, >= 0; 0 leaves it out.
        like: A fit of the same problems to begin at, and whose priors to take; left out, the
            curve's own starts.
        rounds: Times the scale and the outliers are found anew.
    """
    log_loss_BN = np.where(use_BN > 0, log_loss_BN, 0.0)
    if like is None:
        mean_BP, sd_P = curve.prior(log_loss_BN, use_BN, inputs)
        weight_BN = np.sqrt(use_BN) / FIRST_SCALE
        theta_BP = _best_start(curve, inputs, log_loss_BN, weight_BN, mean_BP, sd_P)
    else:
        mean_BP, sd_P = like.mean_BP, like.sd_P
        weight_BN = np.sqrt(use_BN) / like.scale_B[:, None]
        theta_BP = like.theta_BP
    problem = _Problem(curve, inputs, log_loss_BN, mean_BP, sd_P)
    theta_BP, cost_B = problem.solve(theta_BP, weight_BN, _STEPS)
    scale_B = np.full(len(theta_BP), FIRST_SCALE)
    for _ in range(rounds):
        scale_B, weight_BN = problem.noise(theta_BP, weight_BN, use_BN)
        theta_BP, cost_B = problem.solve(theta_BP, weight_BN, _STEPS // 4)
    return Fitted(theta_BP, mean_BP, sd_P, weight_BN, scale_B, cost_B)


def bootstrap(
    curve: Curve, inputs: Inputs, log_loss_BN: Floats, fitted: Fitted, draws_KN: Floats
) -> Floats:
    """Return coefficients under K reweightings of the rows, shape (K, B, P), by a Newton step.

    Args:
        curve: The formula.
        inputs: The N rows.
        log_loss_BN: Log losses.
        fitted: The fit to begin at.
        draws_KN: Weights of the rows in each draw, with a mean of 1.
    """
    y_BN = np.where(fitted.weight_BN > 0, log_loss_BN, 0.0)
    at_BN, jac_BNP = curve.evaluate(fitted.theta_BP, inputs)
    jac_BNP *= fitted.weight_BN[:, :, None]
    off_BN = (at_BN - y_BN) * fitted.weight_BN
    pull_BP = (fitted.theta_BP - fitted.mean_BP) / fitted.sd_P**2
    found = []
    for draw_N in draws_KN:
        weighted_BPN = np.swapaxes(jac_BNP, 1, 2) * draw_N
        hessian_BPP = weighted_BPN @ jac_BNP + np.diag(1 / fitted.sd_P**2)
        gradient_BP = (weighted_BPN @ off_BN[:, :, None])[:, :, 0] + pull_BP
        step_BP = np.linalg.solve(hessian_BPP, gradient_BP[:, :, None])[:, :, 0]
        found.append(fitted.theta_BP - np.clip(step_BP, -_LARGEST_STEP, _LARGEST_STEP))
    return np.stack(found)


def _best_start(
    curve: Curve,
    inputs: Inputs,
    log_loss_BN: Floats,
    weight_BN: Floats,
    mean_BP: Floats,
    sd_P: Floats,
) -> Floats:
    """Return, for each problem, the start that is best after a few steps."""
    starts = curve.starts(mean_BP)
    if len(starts) == 1:
        return starts[0]
    solved = _Problem(curve, inputs, log_loss_BN, mean_BP, sd_P)
    ends = [solved.solve(start_BP, weight_BN, 12) for start_BP in starts]
    best_B = np.argmin([cost_B for _, cost_B in ends], axis=0)
    return np.stack([theta_BP for theta_BP, _ in ends])[best_B, np.arange(len(best_B))]


class _Problem:
    """B problems of one curve on the same rows."""

    def __init__(
        self, curve: Curve, inputs: Inputs, log_loss_BN: Floats, mean_BP: Floats, sd_P: Floats
    ) -> None:
        self._curve = curve
        self._inputs = inputs
        self._y_BN = log_loss_BN
        self._mean_BP = mean_BP
        self._precision_P = 1 / sd_P**2

    def solve(self, theta_BP: Floats, weight_BN: Floats, most: int) -> tuple[Floats, Floats]:
        """Return coefficients, shape (B, P), and costs, shape (B,), by Levenberg-Marquardt."""
        theta_BP = theta_BP.copy()
        count = len(theta_BP)
        cost_B, damp_B = np.full(count, np.inf), np.full(count, 1e-3)
        active = np.arange(count)
        state = self._normal(theta_BP, weight_BN, active)
        cost_B[active] = state[0]
        for _ in range(most):
            _, gradient_BP, hessian_BPP = state
            diagonal_BP = np.einsum("bpp->bp", hessian_BPP)
            damped_BPP = hessian_BPP.copy()
            np.einsum("bpp->bp", damped_BPP)[...] += damp_B[active, None] * diagonal_BP
            step_BP = np.linalg.solve(damped_BPP, gradient_BP[:, :, None])[:, :, 0]
            new_BP = theta_BP[active] - np.clip(step_BP, -_LARGEST_STEP, _LARGEST_STEP)
            trial = theta_BP.copy()
            trial[active] = new_BP
            after = self._normal(trial, weight_BN, active)
            better_B = after[0] < cost_B[active]
            gain_B = np.where(better_B, cost_B[active] - after[0], 0.0)
            theta_BP[active[better_B]] = new_BP[better_B]
            cost_B[active[better_B]] = after[0][better_B]
            damp_B[active] *= np.where(better_B, 0.2, 6.0)
            # A step that was refused is tried again, shorter, until it is too short to matter.
            going_B = np.where(better_B, gain_B > _CONVERGED * (1 + after[0]), damp_B[active] < 1e8)
            kept = tuple(_chosen(better_B, new, old) for new, old in zip(after, state, strict=True))
            state = tuple(part[going_B] for part in kept)
            active = active[going_B]
            if not active.size:
                break
        return theta_BP, cost_B

    def _normal(
        self, theta_BP: Floats, weight_BN: Floats, active: np.ndarray
    ) -> tuple[Floats, ...]:
        """Return cost, gradient and Gauss-Newton Hessian of the active problems."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            at_BN, jac_BNP = self._curve.evaluate(theta_BP[active], self._inputs, active)
            jac_BNP *= weight_BN[active, :, None]
            off_BN = (at_BN - self._y_BN[active]) * weight_BN[active]
        away_BP = theta_BP[active] - self._mean_BP[active]
        pull_BP = away_BP * self._precision_P
        cost_B = 0.5 * (np.square(off_BN).sum(axis=1) + (away_BP * pull_BP).sum(axis=1))
        turned_BPN = np.swapaxes(jac_BNP, 1, 2)
        gradient_BP = (turned_BPN @ off_BN[:, :, None])[:, :, 0] + pull_BP
        hessian_BPP = turned_BPN @ jac_BNP + np.diag(self._precision_P)
        broken_B = ~np.isfinite(hessian_BPP).all(axis=(1, 2)) | ~np.isfinite(cost_B)
        cost_B[broken_B] = np.inf
        return cost_B, gradient_BP, hessian_BPP

    def noise(self, theta_BP: Floats, weight_BN: Floats, use_BN: Floats) -> tuple[Floats, Floats]:
        """Return the scale of the noise, shape (B,), and weights by it, shape (B, N)."""
        at_BN, jac_BNP = self._curve.evaluate(theta_BP, self._inputs)
        off_BN = at_BN - self._y_BN
        jac_BNP *= weight_BN[:, :, None]
        hessian_BPP = np.swapaxes(jac_BNP, 1, 2) @ jac_BNP + np.diag(self._precision_P)
        solved_BPN = np.linalg.solve(hessian_BPP, np.swapaxes(jac_BNP, 1, 2))
        leverage_BN = np.einsum("bnp,bpn->bn", jac_BNP, solved_BPN)
        off_BN = off_BN / np.sqrt(np.clip(1 - leverage_BN, 0.05, 1))
        used_BN = np.where(use_BN > 0, np.abs(off_BN), np.nan)
        scale_B = np.maximum(1.4826 * np.nanmedian(used_BN, axis=1), _MIN_SCALE)
        ratio_BN = (off_BN / scale_B[:, None]) ** 2
        doubt_BN = (DEGREES + 1) / (DEGREES + ratio_BN)
        return scale_B, np.sqrt(use_BN * doubt_BN) / scale_B[:, None]


def _chosen(better_B: np.ndarray, new: Floats, old: Floats) -> Floats:
    return np.where(better_B.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)
