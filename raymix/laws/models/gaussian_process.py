"""Gaussian process for the residuals of a parametric curve.

Universal kriging of the log loss. The curve, linearized in its coefficients around their fit, with
their priors, and the process are one Gaussian model, so they are estimated jointly:

    log loss = curve(theta) + process(sqrt(r), log s) + noise

The kernel is a Matern 5/2 in the square roots of the shares, one length scale per domain, times a
Matern 3/2 in log steps, so residuals of neighboring checkpoints of a run are correlated. High
losses are also noisy (they belong to domains with few tokens): the log of the noise is linear in
the predicted level. Outliers are downweighted by Student's t of the leave-one-out residuals.
Hyper-parameters maximize the marginal likelihood times wide priors.

Shapes: N rows, M rows of a prediction, D domains, P coefficients, H hyper-parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.optimize import minimize

from raymix.laws.models.least_squares import DEGREES_OF_FREEDOM
from raymix.laws.table import Floats

MAX_HYPER_ROWS = 256
"""Largest number of rows for the fit of hyper-parameters; predictions use all rows."""
# Each iteration costs O(N^3), and predictions depend little on the last digits of
# hyper-parameters. New outlier weights move the optimum little.
_MAX_ITERATIONS = 15
_MAX_REFIT_ITERATIONS = 3
_BOUND_SDS = 8.0
"""Bounds of the hyper-parameters, in prior standard deviations from the prior mean."""
_MIN_SHARE = 1e-9  # the root of a share has an infinite slope at 0
# The LAPACK routines themselves: scipy has no function for the inverse from a Cholesky factor
# (potri).
_potrf, _potrs, _potri = get_lapack_funcs(("potrf", "potrs", "potri"), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class ProcessRows:
    """Training rows of one target's process."""

    root_ND: Floats
    """Square roots of the shares, shape (N, D)."""
    log_step_N: Floats
    """Shape (N,)."""
    level_N: Floats
    """Predicted log loss, standardized, shape (N,)."""
    residual_N: Floats
    """Log loss minus the linearized curve at its prior mean, shape (N,)."""
    scaled_jac_NP: Floats
    """Jacobian of the curve times the prior's standard deviations, shape (N, P)."""
    robust_weight_N: Floats
    """Outlier weights, in (0, 1.25], shape (N,)."""

    def subsample(self, max_rows: int) -> ProcessRows:
        """Return at most `max_rows` rows, evenly spaced."""
        count = len(self.residual_N)
        if count <= max_rows:
            return self
        at = np.arange(max_rows) * count // max_rows
        return ProcessRows(*(getattr(self, name)[at] for name in ProcessRows.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Hyper:
    """Logs of the hyper-parameters, and their vector for the optimizer."""

    length_D: Floats
    amplitude: float
    noise: float
    slope: float
    """Slope of the log noise in the standardized level; not a log itself."""
    step_length: float

    @property
    def vector(self) -> Floats:
        """Return all hyper-parameters, shape (H,): D lengths, then the other four."""
        rest = (self.amplitude, self.noise, self.slope, self.step_length)
        return np.concatenate([self.length_D, rest])

    @classmethod
    def of(cls, vector_H: Floats) -> Hyper:
        """Return the hyper-parameters of a vector, shape (H,)."""
        rest = (float(value) for value in vector_H[-4:])
        return cls(vector_H[:-4], *rest)

    def noise_at(self, level_N: Floats, robust_weight_N: Floats) -> Floats:
        """Return noise variances, shape (N,)."""
        return np.exp(2 * (self.noise + self.slope * level_N)) / robust_weight_N


def hyper_prior(domains: int, residual: float) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of the prior of the hyper-parameters, shapes (H,).

    Args:
        domains: Number of domains.
        residual: Median absolute residual of the curve, in log loss.
    """
    # 1.5 x the median absolute residual is about its standard deviation. The floor of 0.2 % keeps
    # the logs finite where the curve fits exactly.
    log_amplitude = np.log(max(1.5 * residual, 0.002))
    mean = Hyper(
        np.full(domains, np.log(0.5)), log_amplitude, log_amplitude + np.log(0.5), 0.3, 0.0
    )
    return mean.vector, np.concatenate([np.full(domains, 1.0), (1.0, 1.5, 0.3, 0.7)])


@lru_cache(maxsize=4)
def _upper_mask(count: int) -> Floats:
    """Return ones above the diagonal and halves on it, to sum a symmetric matrix by its upper half.

    LAPACK fills one triangle only.
    """
    return np.triu(np.ones((count, count)), 1) + 0.5 * np.eye(count)


def covariance(hyper: Hyper, root_MD: Floats, step_M: Floats, rows: ProcessRows) -> Floats:
    """Return the covariance of the process between M new points and the rows, shape (M, N)."""
    scale_D = np.sqrt(5) * np.exp(-hyper.length_D)
    a_MD, b_ND = root_MD * scale_D, rows.root_ND * scale_D
    distance_MN = (
        np.square(a_MD).sum(axis=1)[:, None] + np.square(b_ND).sum(axis=1) - 2 * a_MD @ b_ND.T
    )
    # |a|^2 + |b|^2 - 2 a . b is one matrix product, but may round to slightly below 0.
    distance_MN = np.sqrt(np.maximum(distance_MN, 0.0))
    step_factor_MN = np.abs(step_M[:, None] - rows.log_step_N) * (
        np.sqrt(3) * np.exp(-hyper.step_length)
    )
    step_factor_MN = (1 + step_factor_MN) * np.exp(-step_factor_MN)
    variance = np.exp(2 * hyper.amplitude)
    return variance * (1 + distance_MN + distance_MN**2 / 3) * np.exp(-distance_MN) * step_factor_MN


def negative_log_posterior(
    vector_H: Floats, rows: ProcessRows, trend_NN: Floats, mean_H: Floats, sd_H: Floats
) -> tuple[float, Floats]:
    """Return minus the log posterior of the hyper-parameters, and its gradient, shape (H,).

    Args:
        vector_H: The hyper-parameters.
        rows: The training rows.
        trend_NN: Covariance of the rows through the curve's coefficients.
        mean_H: Prior means.
        sd_H: Prior standard deviations.
    """
    # The inner loop of a fit, on N x N arrays: operations are in place, to save temporaries of that
    # size, and arrays change their meaning as noted.
    hyper, count = Hyper.of(vector_H), len(rows.residual_N)
    scale_D = np.sqrt(5) * np.exp(-hyper.length_D)
    a_ND = rows.root_ND * scale_D
    square_N = np.square(a_ND).sum(axis=1)
    distance = a_ND @ a_ND.T
    distance *= -2
    distance += square_N[:, None]
    distance += square_N
    np.sqrt(np.maximum(distance, 0.0, out=distance), out=distance)
    decay = np.exp(-distance)
    decay *= np.exp(2 * hyper.amplitude)
    step_distance = np.abs(rows.log_step_N[:, None] - rows.log_step_N)
    has_steps = bool(step_distance.any())
    if has_steps:
        step_distance *= np.sqrt(3) * np.exp(-hyper.step_length)
        fall = np.exp(-step_distance)
        decay *= (1 + step_distance) * fall
    kernel = distance * distance
    kernel /= 3
    kernel += distance
    kernel += 1
    kernel *= decay
    noise_N = hyper.noise_at(rows.level_N, rows.robust_weight_N)
    # log p(y) = -1/2 y' S^-1 y - 1/2 log det S, with S the sum of kernel, trend and noise.
    total = kernel + trend_NN
    total.flat[:: count + 1] += noise_N
    # total.T is Fortran-ordered, so LAPACK overwrites it without a copy; S is symmetric.
    factor, failed = _potrf(total.T, lower=1, overwrite_a=1, clean=0)
    # Not positive definite through rounding: a large finite value makes the line search step back,
    # inf would break its interpolation.
    if failed:
        return 1e10, np.zeros_like(vector_H)
    weight_N = _potrs(factor, rows.residual_N, lower=1)[0]
    value = 0.5 * rows.residual_N @ weight_N + np.log(factor.diagonal()).sum()
    # d/dx of minus log p is 1/2 tr(S^-1 dS) - 1/2 w' dS w, with w = S^-1 y. `half` is from here on
    # the upper half of the inverse, its diagonal halved, so the trace is a sum over `half * dS`.
    half = _potri(factor, lower=1, overwrite_c=1)[0].T
    half *= _upper_mask(count)
    diagonal_N = 2 * half.diagonal() - weight_N**2
    gradient = np.empty_like(vector_H)
    gradient[-4] = 2 * (half * kernel).sum() - weight_N @ (kernel @ weight_N)
    noisy_N = noise_N * diagonal_N
    gradient[-3], gradient[-2] = noisy_N.sum(), noisy_N @ rows.level_N
    gradient[-1] = 0.0
    if has_steps:
        # d/d(log length) of (1 + q) exp(-q) is q^2 exp(-q): the kernel times q^2 / (1 + q).
        step_derivative = kernel * (step_distance**2 / (1 + step_distance))
        gradient[-1] = (half * step_derivative).sum() - 0.5 * weight_N @ (
            step_derivative @ weight_N
        )
    gradient[:-4] = _length_gradient(hyper, rows, weight_N, half, distance, decay)
    z_H = (vector_H - mean_H) / sd_H
    return float(value + 0.5 * z_H @ z_H), gradient + z_H / sd_H


def _length_gradient(
    hyper: Hyper, rows: ProcessRows, weight_N: Floats, half: Floats, distance: Floats, decay: Floats
) -> Floats:
    """Return the gradient of the negative log likelihood by the log lengths, shape (D,).

    `half` and `distance` are overwritten.
    """
    # In the memory of `distance`: the derivative of the kernel by the squared distance in lengths
    # (hence the 5), then this and `half` are the two terms of the gradient. Squared distances are
    # expanded as above, so that all D lengths cost three products with (N, D) instead of D arrays
    # of (N, N).
    slope = distance
    slope += 1
    slope *= decay
    slope *= -5 / 6
    half *= slope
    slope *= weight_N
    slope *= weight_N[:, None]
    line_N = 0.5 * (half.sum(axis=1) + half.sum(axis=0) - slope.sum(axis=1))
    weighted_root = 0.5 * (half @ rows.root_ND + half.T @ rows.root_ND - slope @ rows.root_ND)
    inner_D = (rows.root_ND**2 * line_N[:, None]).sum(axis=0) - (rows.root_ND * weighted_root).sum(
        axis=0
    )
    return -4 * inner_D * np.exp(-2 * hyper.length_D)


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """One target's process, conditioned on its rows."""

    hyper: Hyper
    rows: ProcessRows
    inverse_NN: Floats
    """Inverse of the covariance of all rows, shape (N, N)."""
    weight_N: Floats
    """The inverse times the residuals, shape (N,)."""

    @property
    def shift_P(self) -> Floats:
        """Return the posterior shift of the coefficients, in prior deviations, shape (P,)."""
        return self.rows.scaled_jac_NP.T @ self.weight_N

    def mean(self, root_MD: Floats, step_M: Floats) -> Floats:
        """Return the posterior mean of the process at new points, in log loss, shape (M,)."""
        return covariance(self.hyper, root_MD, step_M, self.rows) @ self.weight_N

    def deviation(self, root_MD: Floats, step_M: Floats, scaled_jac_MP: Floats) -> Floats:
        """Return posterior standard deviations of the log loss without noise, shape (M,)."""
        cross_MN = covariance(self.hyper, root_MD, step_M, self.rows)
        cross_MN += scaled_jac_MP @ self.rows.scaled_jac_NP.T
        prior_M = np.exp(2 * self.hyper.amplitude) + np.square(scaled_jac_MP).sum(axis=1)
        explained_M = ((cross_MN @ self.inverse_NN) * cross_MN).sum(axis=1)
        # Near a row both terms are nearly equal, and their difference may round below 0.
        return np.sqrt(np.maximum(prior_M - explained_M, 0.0))

    def gradient(self, share_D: Floats, log_step: float) -> Floats:
        """Return derivatives of the mean by the shares, shape (D,)."""
        share_D = np.maximum(share_D, _MIN_SHARE)
        root_D, rows, hyper = np.sqrt(share_D), self.rows, self.hyper
        scale_D = np.sqrt(5) * np.exp(-hyper.length_D)
        distance_N = np.sqrt(np.square((root_D - rows.root_ND) * scale_D).sum(axis=1))
        step_factor_N = np.abs(log_step - rows.log_step_N) * (
            np.sqrt(3) * np.exp(-hyper.step_length)
        )
        step_factor_N = (1 + step_factor_N) * np.exp(-step_factor_N)
        # d k / d(distance^2) = -(1 + distance) exp(-distance) / 6: no division by the distance,
        # which is 0 at a row.
        slope_N = (
            -np.exp(2 * hyper.amplitude)
            / 6
            * (1 + distance_N)
            * np.exp(-distance_N)
            * step_factor_N
        )
        by_root_D = 2 * ((slope_N * self.weight_N) @ (root_D - rows.root_ND)) * scale_D**2
        return by_root_D / (2 * root_D)  # chain rule of the square root


def condition(hyper: Hyper, rows: ProcessRows) -> Process:
    """Return the process conditioned on the rows under given hyper-parameters."""
    total = covariance(hyper, rows.root_ND, rows.log_step_N, rows)
    total += rows.scaled_jac_NP @ rows.scaled_jac_NP.T
    total.flat[:: len(total) + 1] += hyper.noise_at(rows.level_N, rows.robust_weight_N)
    # The inverse itself, not a factor: deviations and leave-one-out residuals need its elements.
    inverse_NN = np.linalg.inv(total).astype(np.float64, copy=False)
    return Process(hyper, rows, inverse_NN, inverse_NN @ rows.residual_N)


def fit_process(rows: ProcessRows, residual: float) -> Process:
    """Return the process with the most probable hyper-parameters, outliers downweighted.

    Args:
        rows: The training rows, with `robust_weight_N` of ones.
        residual: Median absolute residual of the curve, in log loss.
    """
    mean_H, sd_H = hyper_prior(rows.root_ND.shape[1], residual)
    hyper = _maximize_posterior(mean_H, rows, mean_H, sd_H, _MAX_ITERATIONS)
    first = condition(hyper, rows)
    # Leave-one-out residual and variance are w_i / S^-1_ii and 1 / S^-1_ii (Rasmussen and Williams
    # 2006, eq. 5.12): an outlier hides in its own fit, not in that of the others.
    variance_N = 1 / first.inverse_NN.diagonal()
    squared_z_N = (first.weight_N * variance_N) ** 2 / variance_N
    rows = replace(
        rows, robust_weight_N=(DEGREES_OF_FREEDOM + 1) / (DEGREES_OF_FREEDOM + squared_z_N)
    )
    return condition(
        _maximize_posterior(hyper.vector, rows, mean_H, sd_H, _MAX_REFIT_ITERATIONS), rows
    )


def _maximize_posterior(
    start_H: Floats, rows: ProcessRows, mean_H: Floats, sd_H: Floats, max_iterations: int
) -> Hyper:
    subset = rows.subsample(MAX_HYPER_ROWS)
    # The first line search has no curvature yet: without bounds it may step to where exp overflows.
    low_H, high_H = mean_H - _BOUND_SDS * sd_H, mean_H + _BOUND_SDS * sd_H
    result = minimize(
        negative_log_posterior,
        start_H,
        args=(subset, subset.scaled_jac_NP @ subset.scaled_jac_NP.T, mean_H, sd_H),
        jac=True,
        method="L-BFGS-B",
        bounds=np.stack([low_H, high_H], axis=1),
        options={"maxiter": max_iterations},
    )
    return Hyper.of(result.x)
