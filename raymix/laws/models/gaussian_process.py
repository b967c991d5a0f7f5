"""A Gaussian process around a curve: what the formula misses, learned from the rows near by.

Universal kriging of the log loss. The curve, linear in its coefficients around their fit and with
their priors, and a process are one Gaussian model, so neither explains away what the other could:

    log loss = curve(theta) + process(sqrt(r), log s) + noise

The process has a Matern 5/2 kernel in the square roots of the shares, one length per domain, times
a Matern 3/2 kernel in log steps, so that what sets a run apart at one checkpoint does at the next.
Losses that are high are also noisy (a domain that is hardly read is learned by chance): the log of
the noise is linear in the predicted level, and outliers count less, by Student's t of the residual
each row has when it is left out. Hyper-parameters maximize the marginal likelihood under wide
priors. Shapes: N rows, M rows of a prediction, D domains, P coefficients, H hyper-parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.optimize import minimize

from raymix.laws.models.least_squares import DEGREES
from raymix.laws.table import Floats

MOST_ROWS = 256
"""Hyper-parameters are found on so many rows, evenly taken; predictions come from all of them."""
_ITERATIONS = 15
_AGAIN = 3
_FARTHEST = 8.0
"""Deviations of the prior within which hyper-parameters are looked for."""
_MIN_SHARE = 1e-9
_potrf, _potrs, _potri = get_lapack_funcs(("potrf", "potrs", "potri"), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class ProcessRows:
    """What one target's process is fitted to."""

    root_ND: Floats
    """Square roots of the shares, shape (N, D)."""
    log_step_N: Floats
    """Shape (N,)."""
    level_N: Floats
    """Predicted log loss, standardized, shape (N,)."""
    left_N: Floats
    """Log loss less the curve at its prior mean, linear in the coefficients, shape (N,)."""
    spread_NP: Floats
    """Jacobian of the curve times the prior's standard deviations, shape (N, P)."""
    doubt_N: Floats
    """Weights by outlier, in (0, 1.25], shape (N,)."""

    def some(self, most: int) -> ProcessRows:
        """Return about `most` of the rows, evenly taken."""
        count = len(self.left_N)
        if count <= most:
            return self
        at = np.arange(most) * count // most
        return ProcessRows(*(getattr(self, name)[at] for name in ProcessRows.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Hyper:
    """Logs of the hyper-parameters; `vector` and back."""

    length_D: Floats
    amplitude: float
    noise: float
    slope: float
    """Of the log noise by the standardized level; not a log itself."""
    step_length: float

    @property
    def vector(self) -> Floats:
        """Return all of them, shape (H,)."""
        rest = (self.amplitude, self.noise, self.slope, self.step_length)
        return np.concatenate([self.length_D, rest])

    @classmethod
    def of(cls, vector_H: Floats) -> Hyper:
        """Return them from their vector."""
        rest = (float(value) for value in vector_H[-4:])
        return cls(vector_H[:-4], *rest)

    def noise_at(self, level_N: Floats, doubt_N: Floats) -> Floats:
        """Return variances of the noise, shape (N,)."""
        return np.exp(2 * (self.noise + self.slope * level_N)) / doubt_N


def usual(domains: int, residual: float) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of the prior of the hyper-parameters, shapes (H,).

    Args:
        domains: How many.
        residual: Usual size of what the curve misses, in log loss.
    """
    size = np.log(max(1.5 * residual, 0.002))
    mean = Hyper(np.full(domains, np.log(0.5)), size, size + np.log(0.5), 0.3, 0.0)
    return mean.vector, np.concatenate([np.full(domains, 1.0), (1.0, 1.5, 0.3, 0.7)])


@lru_cache(maxsize=4)
def _upper(count: int) -> Floats:
    """Return ones above the diagonal and halves on it: sums over half of a symmetric matrix."""
    return np.triu(np.ones((count, count)), 1) + 0.5 * np.eye(count)


def covariance(hyper: Hyper, root_MD: Floats, step_M: Floats, rows: ProcessRows) -> Floats:
    """Return the process' covariance of M new points with the rows, shape (M, N)."""
    scale_D = np.sqrt(5) * np.exp(-hyper.length_D)
    a_MD, b_ND = root_MD * scale_D, rows.root_ND * scale_D
    far_MN = np.square(a_MD).sum(axis=1)[:, None] + np.square(b_ND).sum(axis=1) - 2 * a_MD @ b_ND.T
    far_MN = np.sqrt(np.maximum(far_MN, 0.0))
    late_MN = np.abs(step_M[:, None] - rows.log_step_N) * (np.sqrt(3) * np.exp(-hyper.step_length))
    late_MN = (1 + late_MN) * np.exp(-late_MN)
    square = np.exp(2 * hyper.amplitude)
    return square * (1 + far_MN + far_MN**2 / 3) * np.exp(-far_MN) * late_MN


def negative_evidence(
    vector_H: Floats, rows: ProcessRows, trend_NN: Floats, mean_H: Floats, sd_H: Floats
) -> tuple[float, Floats]:
    """Return minus the log posterior of the hyper-parameters, and its gradient, shape (H,).

    Args:
        vector_H: Where.
        rows: The data.
        trend_NN: Covariance that the curve's coefficients give the rows.
        mean_H: Of the prior.
        sd_H: Of the prior.
    """
    hyper, count = Hyper.of(vector_H), len(rows.left_N)
    scale_D = np.sqrt(5) * np.exp(-hyper.length_D)
    a_ND = rows.root_ND * scale_D
    square_N = np.square(a_ND).sum(axis=1)
    far = a_ND @ a_ND.T
    far *= -2
    far += square_N[:, None]
    far += square_N
    np.sqrt(np.maximum(far, 0.0, out=far), out=far)
    decay = np.exp(-far)
    decay *= np.exp(2 * hyper.amplitude)
    late = np.abs(rows.log_step_N[:, None] - rows.log_step_N)
    stepped = bool(late.any())
    if stepped:
        late *= np.sqrt(3) * np.exp(-hyper.step_length)
        fall = np.exp(-late)
        decay *= (1 + late) * fall
    kernel = far * far
    kernel /= 3
    kernel += far
    kernel += 1
    kernel *= decay
    noise_N = hyper.noise_at(rows.level_N, rows.doubt_N)
    total = kernel + trend_NN
    total.flat[:: count + 1] += noise_N
    factor, failed = _potrf(total.T, lower=1, overwrite_a=1, clean=0)
    if failed:
        return 1e10, np.zeros_like(vector_H)
    weight_N = _potrs(factor, rows.left_N, lower=1)[0]
    value = 0.5 * rows.left_N @ weight_N + np.log(factor.diagonal()).sum()
    # From here on `half` is the inverse's upper half, its diagonal halved.
    half = _potri(factor, lower=1, overwrite_c=1)[0].T
    half *= _upper(count)
    diagonal_N = 2 * half.diagonal() - weight_N**2
    gradient = np.empty_like(vector_H)
    gradient[-4] = 2 * (half * kernel).sum() - weight_N @ (kernel @ weight_N)
    noisy_N = noise_N * diagonal_N
    gradient[-3], gradient[-2] = noisy_N.sum(), noisy_N @ rows.level_N
    gradient[-1] = 0.0
    if stepped:
        # d/d(log length) of (1 + q) exp(-q) is q^2 exp(-q), over what it stands for in the kernel.
        slow = kernel * (late**2 / (1 + late))
        gradient[-1] = (half * slow).sum() - 0.5 * weight_N @ (slow @ weight_N)
    far += 1
    far *= decay
    far *= -5 / 6
    half *= far
    far *= weight_N
    far *= weight_N[:, None]
    line_N = 0.5 * (half.sum(axis=1) + half.sum(axis=0) - far.sum(axis=1))
    moved = 0.5 * (half @ rows.root_ND + half.T @ rows.root_ND - far @ rows.root_ND)
    inner_D = (rows.root_ND**2 * line_N[:, None]).sum(axis=0) - (rows.root_ND * moved).sum(axis=0)
    gradient[:-4] = -4 * inner_D * np.exp(-2 * hyper.length_D)
    away_H = (vector_H - mean_H) / sd_H
    return float(value + 0.5 * away_H @ away_H), gradient + away_H / sd_H


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """One target's process, conditioned on its rows."""

    hyper: Hyper
    rows: ProcessRows
    inverse_NN: Floats
    """Of the covariance of all rows."""
    weight_N: Floats
    """The inverse times what is left, shape (N,)."""

    @property
    def shift_P(self) -> Floats:
        """Return how far the rows move the coefficients, in the prior's deviations, shape (P,)."""
        return self.rows.spread_NP.T @ self.weight_N

    def mean(self, root_MD: Floats, step_M: Floats) -> Floats:
        """Return the process' part of the log loss at new points, shape (M,)."""
        return covariance(self.hyper, root_MD, step_M, self.rows) @ self.weight_N

    def deviation(self, root_MD: Floats, step_M: Floats, spread_MP: Floats) -> Floats:
        """Return standard deviations of the log loss without noise, shape (M,)."""
        cross_MN = covariance(self.hyper, root_MD, step_M, self.rows)
        cross_MN += spread_MP @ self.rows.spread_NP.T
        prior_M = np.exp(2 * self.hyper.amplitude) + np.square(spread_MP).sum(axis=1)
        known_M = ((cross_MN @ self.inverse_NN) * cross_MN).sum(axis=1)
        return np.sqrt(np.maximum(prior_M - known_M, 0.0))

    def gradient(self, share_D: Floats, log_step: float) -> Floats:
        """Return derivatives of the mean by the shares, shape (D,)."""
        share_D = np.maximum(share_D, _MIN_SHARE)
        root_D, rows, hyper = np.sqrt(share_D), self.rows, self.hyper
        scale_D = np.sqrt(5) * np.exp(-hyper.length_D)
        far_N = np.sqrt(np.square((root_D - rows.root_ND) * scale_D).sum(axis=1))
        late_N = np.abs(log_step - rows.log_step_N) * (np.sqrt(3) * np.exp(-hyper.step_length))
        late_N = (1 + late_N) * np.exp(-late_N)
        # d k / d(far^2) = -(1 + far) exp(-far) / 6
        slope_N = -np.exp(2 * hyper.amplitude) / 6 * (1 + far_N) * np.exp(-far_N) * late_N
        by_root_D = 2 * ((slope_N * self.weight_N) @ (root_D - rows.root_ND)) * scale_D**2
        return by_root_D / (2 * root_D)


def condition(hyper: Hyper, rows: ProcessRows) -> Process:
    """Return the process with these hyper-parameters, given the rows."""
    total = covariance(hyper, rows.root_ND, rows.log_step_N, rows)
    total += rows.spread_NP @ rows.spread_NP.T
    total.flat[:: len(total) + 1] += hyper.noise_at(rows.level_N, rows.doubt_N)
    inverse_NN = np.linalg.inv(total).astype(np.float64, copy=False)
    return Process(hyper, rows, inverse_NN, inverse_NN @ rows.left_N)


def fit_process(rows: ProcessRows, residual: float) -> Process:
    """Return the process that the rows make most likely.

    Args:
        rows: The data, with `doubt_N` of ones.
        residual: Usual size of what the curve misses, in log loss.
    """
    mean_H, sd_H = usual(rows.root_ND.shape[1], residual)
    hyper = _likeliest(mean_H, rows, mean_H, sd_H, _ITERATIONS)
    first = condition(hyper, rows)
    variance_N = 1 / first.inverse_NN.diagonal()
    left_out_N = (first.weight_N * variance_N) ** 2 / variance_N
    rows = replace(rows, doubt_N=(DEGREES + 1) / (DEGREES + left_out_N))
    return condition(_likeliest(hyper.vector, rows, mean_H, sd_H, _AGAIN), rows)


def _likeliest(
    start_H: Floats, rows: ProcessRows, mean_H: Floats, sd_H: Floats, most: int
) -> Hyper:
    some = rows.some(MOST_ROWS)
    # A line search that leaves these limits would overflow on its way back.
    low_H, high_H = mean_H - _FARTHEST * sd_H, mean_H + _FARTHEST * sd_H
    found = minimize(
        negative_evidence,
        start_H,
        args=(some, some.spread_NP @ some.spread_NP.T, mean_H, sd_H),
        jac=True,
        method="L-BFGS-B",
        bounds=np.stack([low_H, high_H], axis=1),
        options={"maxiter": most},
    )
    return Hyper.of(found.x)
