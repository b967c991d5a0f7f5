"""Robust least squares for many curves at once, in the log of the loss, with Gaussian priors.

A *curve* is a formula with a Jacobian. Targets, folds and starts form one batch of
Levenberg-Marquardt problems: they share the rows and differ in the weight of each row. The result
is the posterior mode: the sum of squared residuals of the log loss over the noise scale, plus
squared distances of the coefficients from their prior means over the prior's standard deviations.
With few runs the prior determines coefficients that the rows do not; with many it is negligible.
Outliers are downweighted as under Student's t noise with four degrees of freedom, by iterative
reweighting; the noise scale is the median of studentized absolute residuals.

Shapes: B problems, N rows, P coefficients, D domains, K bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raymix.laws.table import Floats

DEGREES_OF_FREEDOM = 4.0
"""Degrees of freedom of Student's t noise."""
INITIAL_SCALE = 0.01
"""Noise scale of the log loss before the first residuals, about 1 % of the loss."""
# Tables computed from a formula have no noise: weights of 1 / scale must stay finite.
_MIN_SCALE = 1e-5
# Coefficients are logs: a step of 2 is a factor of 7, far outside the range of the linearization.
_MAX_STEP = 2.0
# A gain of the cost below this, relative to 1 + cost, ends a problem. The cost is in units of the
# noise, so such a gain moves no prediction visibly.
_MIN_RELATIVE_GAIN = 1e-9
_MAX_ITERATIONS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Rows at which a curve is evaluated."""

    share_ND: Floats
    """Shares, >= 0, shape (N, D)."""
    log_step_N: Floats
    """Logs of steps over the unit of the fit, shape (N,); zeros without steps."""

    def rows(self, chosen_N: np.ndarray) -> Inputs:
        """Return the selected rows: a mask or indices."""
        return Inputs(self.share_ND[chosen_N], self.log_step_N[chosen_N])


class Curve(Protocol):
    """A formula for the log loss, with its derivatives."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the P coefficients, transformed as in the fit (log, logit)."""
        ...

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P).

        Problem b fits target b modulo V; `at_B` are the numbers of the problems, default all.
        """
        ...

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return means, shape (B, P), and standard deviations, shape (P,), of coefficients."""
        ...

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return starting points, each of shape (B, P)."""
        ...

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class CurveFits:
    """B fitted curves."""

    theta_BP: Floats
    mean_BP: Floats
    """Prior means."""
    sd_P: Floats
    """Prior standard deviations."""
    weight_BN: Floats
    """Inverse noise scale of each row, downweighted for outliers; 0 for rows not used."""
    scale_B: Floats
    """Noise scale of the log loss."""
    cost_B: Floats
    """Half the minimized sum of squares."""

    def select(self, chosen: slice) -> CurveFits:
        """Return a slice of the curves."""
        rest = (self.weight_BN[chosen], self.scale_B[chosen], self.cost_B[chosen])
        return CurveFits(self.theta_BP[chosen], self.mean_BP[chosen], self.sd_P, *rest)

    def tile(self, count: int) -> CurveFits:
        """Return all curves, repeated `count` times."""
        rest = (np.tile(self.weight_BN, (count, 1)), np.tile(self.scale_B, count))
        theta_BP, mean_BP = (np.tile(part, (count, 1)) for part in (self.theta_BP, self.mean_BP))
        return CurveFits(theta_BP, mean_BP, self.sd_P, *rest, np.tile(self.cost_B, count))


def fit_curves(
    curve: Curve,
    inputs: Inputs,
    log_loss_BN: Floats,
    use_BN: Floats,
    *,
    warm_start: CurveFits | None = None,
    rounds: int = 2,
) -> CurveFits:
    """Return B fitted curves.

    Args:
        curve: The formula.
        inputs: The N rows.
        log_loss_BN: Log losses; those not used may be NaN.
        use_BN: Weight of each row in each problem, >= 0; 0 leaves it out.
        warm_start: A fit of the same problems to start from, with its priors; default: the
            curve's own starts and priors.
        rounds: Number of times that the noise scale and the outlier weights are updated.
    """
    # Weights of 0 do not remove a NaN: 0 x NaN is NaN.
    log_loss_BN = np.where(use_BN > 0, log_loss_BN, 0.0)
    if warm_start is None:
        mean_BP, sd_P = curve.prior(log_loss_BN, use_BN, inputs)
        weight_BN = np.sqrt(use_BN) / INITIAL_SCALE
        theta_BP = _best_start(curve, inputs, log_loss_BN, weight_BN, mean_BP, sd_P)
    else:
        mean_BP, sd_P = warm_start.mean_BP, warm_start.sd_P
        weight_BN = np.sqrt(use_BN) / warm_start.scale_B[:, None]
        theta_BP = warm_start.theta_BP
    problem = _Problem(curve, inputs, log_loss_BN, mean_BP, sd_P)
    theta_BP, cost_B = problem.solve(theta_BP, weight_BN, _MAX_ITERATIONS)
    scale_B = np.full(len(theta_BP), INITIAL_SCALE)
    for _ in range(rounds):
        scale_B, weight_BN = problem.noise(theta_BP, weight_BN, use_BN)
        # New weights move the optimum little: a quarter of the steps is enough from here.
        theta_BP, cost_B = problem.solve(theta_BP, weight_BN, _MAX_ITERATIONS // 4)
    return CurveFits(theta_BP, mean_BP, sd_P, weight_BN, scale_B, cost_B)


def bootstrap(
    curve: Curve, inputs: Inputs, log_loss_BN: Floats, fitted: CurveFits, draws_KN: Floats
) -> Floats:
    """Return coefficients under K reweightings of the rows, shape (K, B, P), by one Newton step.

    Args:
        curve: The formula.
        inputs: The N rows.
        log_loss_BN: Log losses.
        fitted: The fit to start from.
        draws_KN: Weights of the rows in each draw, with mean 1.
    """
    y_BN = np.where(fitted.weight_BN > 0, log_loss_BN, 0.0)
    at_BN, jac_BNP = curve.evaluate(fitted.theta_BP, inputs)
    jac_BNP *= fitted.weight_BN[:, :, None]
    residual_BN = (at_BN - y_BN) * fitted.weight_BN
    prior_gradient_BP = (fitted.theta_BP - fitted.mean_BP) / fitted.sd_P**2
    theta_draws = []
    # One draw at a time: all at once would need K x B x N x P numbers. Residuals and Jacobian are
    # those of the fit, so a draw costs one small solve instead of a fit.
    for draw_N in draws_KN:
        weighted_BPN = np.swapaxes(jac_BNP, 1, 2) * draw_N
        hessian_BPP = weighted_BPN @ jac_BNP + np.diag(1 / fitted.sd_P**2)
        gradient_BP = (weighted_BPN @ residual_BN[:, :, None])[:, :, 0] + prior_gradient_BP
        step_BP = np.linalg.solve(hessian_BPP, gradient_BP[:, :, None])[:, :, 0]
        theta_draws.append(fitted.theta_BP - np.clip(step_BP, -_MAX_STEP, _MAX_STEP))
    return np.stack(theta_draws)


def _best_start(
    curve: Curve,
    inputs: Inputs,
    log_loss_BN: Floats,
    weight_BN: Floats,
    mean_BP: Floats,
    sd_P: Floats,
) -> Floats:
    """Return, for each problem, the starting point with the smallest cost after 12 iterations."""
    starts = curve.starts(mean_BP)
    if len(starts) == 1:
        return starts[0]
    problem = _Problem(curve, inputs, log_loss_BN, mean_BP, sd_P)
    solutions = [problem.solve(start_BP, weight_BN, 12) for start_BP in starts]
    best_B = np.argmin([cost_B for _, cost_B in solutions], axis=0)
    return np.stack([theta_BP for theta_BP, _ in solutions])[best_B, np.arange(len(best_B))]


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

    def solve(
        self, theta_BP: Floats, weight_BN: Floats, max_iterations: int
    ) -> tuple[Floats, Floats]:
        """Return coefficients, shape (B, P), and costs, shape (B,), by Levenberg-Marquardt."""
        theta_BP = theta_BP.copy()
        count = len(theta_BP)
        # Problems converge at different iterations; only active ones are evaluated.
        cost_B, damping_B = np.full(count, np.inf), np.full(count, 1e-3)
        active = np.arange(count)
        state = self._normal_equations(theta_BP, weight_BN, active)
        cost_B[active] = state[0]
        for _ in range(max_iterations):
            _, gradient_BP, hessian_BPP = state
            diagonal_BP = np.einsum("bpp->bp", hessian_BPP)
            # Marquardt's damping of the diagonal makes steps independent of coefficients' units.
            # einsum returns a writable view of the diagonals, np.diagonal a read-only one.
            damped_BPP = hessian_BPP.copy()
            np.einsum("bpp->bp", damped_BPP)[...] += damping_B[active, None] * diagonal_BP
            step_BP = np.linalg.solve(damped_BPP, gradient_BP[:, :, None])[:, :, 0]
            new_BP = theta_BP[active] - np.clip(step_BP, -_MAX_STEP, _MAX_STEP)
            trial = theta_BP.copy()
            trial[active] = new_BP
            trial_state = self._normal_equations(trial, weight_BN, active)
            improved_B = trial_state[0] < cost_B[active]
            gain_B = np.where(improved_B, cost_B[active] - trial_state[0], 0.0)
            theta_BP[active[improved_B]] = new_BP[improved_B]
            cost_B[active[improved_B]] = trial_state[0][improved_B]
            damping_B[active] *= np.where(improved_B, 0.2, 6.0)
            # A rejected step is tried again with more damping, until it is too short to matter.
            unfinished_B = np.where(
                improved_B,
                gain_B > _MIN_RELATIVE_GAIN * (1 + trial_state[0]),
                damping_B[active] < 1e8,
            )
            accepted = tuple(
                _select(improved_B, new, old) for new, old in zip(trial_state, state, strict=True)
            )
            state = tuple(part[unfinished_B] for part in accepted)
            active = active[unfinished_B]
            if not active.size:
                break
        return theta_BP, cost_B

    def _normal_equations(
        self, theta_BP: Floats, weight_BN: Floats, active: np.ndarray
    ) -> tuple[Floats, ...]:
        """Return cost, gradient and Gauss-Newton Hessian of the active problems."""
        # A trial step may overflow exp; its cost is set to inf below, so it is rejected.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            at_BN, jac_BNP = self._curve.evaluate(theta_BP[active], self._inputs, active)
            jac_BNP *= weight_BN[active, :, None]
            residual_BN = (at_BN - self._y_BN[active]) * weight_BN[active]
        prior_offset_BP = theta_BP[active] - self._mean_BP[active]
        prior_gradient_BP = prior_offset_BP * self._precision_P
        cost_B = 0.5 * (
            np.square(residual_BN).sum(axis=1) + (prior_offset_BP * prior_gradient_BP).sum(axis=1)
        )
        jac_BPN = np.swapaxes(jac_BNP, 1, 2)
        gradient_BP = (jac_BPN @ residual_BN[:, :, None])[:, :, 0] + prior_gradient_BP
        hessian_BPP = jac_BPN @ jac_BNP + np.diag(self._precision_P)
        invalid_B = ~np.isfinite(hessian_BPP).all(axis=(1, 2)) | ~np.isfinite(cost_B)
        cost_B[invalid_B] = np.inf
        return cost_B, gradient_BP, hessian_BPP

    def noise(self, theta_BP: Floats, weight_BN: Floats, use_BN: Floats) -> tuple[Floats, Floats]:
        """Return the noise scale, shape (B,), and the row weights under it, shape (B, N)."""
        at_BN, jac_BNP = self._curve.evaluate(theta_BP, self._inputs)
        residual_BN = at_BN - self._y_BN
        jac_BNP *= weight_BN[:, :, None]
        hessian_BPP = np.swapaxes(jac_BNP, 1, 2) @ jac_BNP + np.diag(self._precision_P)
        projection_BPN = np.linalg.solve(hessian_BPP, np.swapaxes(jac_BNP, 1, 2))
        leverage_BN = np.einsum("bnp,bpn->bn", jac_BNP, projection_BPN)
        # Residuals of rows with leverage h shrink by sqrt(1 - h): with few rows per coefficient
        # the raw median would be far too small. Clipped, as h may round to 1.
        residual_BN = residual_BN / np.sqrt(np.clip(1 - leverage_BN, 0.05, 1))
        used_BN = np.where(use_BN > 0, np.abs(residual_BN), np.nan)
        # 1.4826 x the median absolute residual is the standard deviation of normal noise.
        scale_B = np.maximum(1.4826 * np.nanmedian(used_BN, axis=1), _MIN_SCALE)
        # The E step of the EM algorithm for Student's t: weight (nu + 1) / (nu + z^2).
        ratio_BN = (residual_BN / scale_B[:, None]) ** 2
        robust_weight_BN = (DEGREES_OF_FREEDOM + 1) / (DEGREES_OF_FREEDOM + ratio_BN)
        return scale_B, np.sqrt(use_BN * robust_weight_BN) / scale_B[:, None]


def _select(improved_B: np.ndarray, new: Floats, old: Floats) -> Floats:
    return np.where(improved_B.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)
