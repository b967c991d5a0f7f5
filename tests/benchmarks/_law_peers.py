"""Laws as others fit them, on the same rows: ordinary fits without priors, by scipy and others.

None of this uses raymix. Each peer is a function (share_RD, log_step_R, loss_R, new shares, new
log steps) -> losses. Shapes: R rows, D domains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Floats = NDArray[np.float64]
Peer = Callable[[Floats, Floats, Floats, Floats, Floats], Floats]
ZERO = 0.005
"""Added to shares where a law needs it, with steps (the notes' choice)."""


def mean(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    return np.full(len(new), loss.mean())


def linear(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    weight = np.linalg.lstsq(share, loss, rcond=None)[0]
    return new @ weight


def lightgbm(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    """RegMix' settings; the number of rounds by an 80/20 split of the training rows."""
    import lightgbm as lgb

    settings = {"learning_rate": 0.01, "metric": "l2", "verbosity": -1, "num_threads": 1}
    order = np.random.default_rng(0).permutation(len(loss))
    validation, training = order[: len(loss) // 5], order[len(loss) // 5 :]
    first = lgb.train(
        settings,
        lgb.Dataset(share[training], loss[training]),
        num_boost_round=1000,
        valid_sets=[lgb.Dataset(share[validation], loss[validation])],
        callbacks=[lgb.early_stopping(20, verbose=False)],
    )
    rounds = max(1, first.best_iteration)
    return lgb.train(settings, lgb.Dataset(share, loss), num_boost_round=rounds).predict(new)


def process(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    """A Gaussian process on the square roots of the shares, Matern 5/2, a length per domain."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    lengths = np.full(share.shape[1], 1.0)
    kernel = ConstantKernel(1.0) * Matern(lengths, (1e-2, 1e2), nu=2.5) + WhiteKernel(1e-2)
    middle, size = np.log(loss).mean(), np.log(loss).std()
    model = GaussianProcessRegressor(kernel, optimizer=_few_steps)
    with warnings.catch_warnings():
        # A few steps are what the notes gave it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.sqrt(share), (np.log(loss) - middle) / size)
    return np.exp(model.predict(np.sqrt(new)) * size + middle)


def _few_steps(objective: Callable, start: Floats, bounds: Floats) -> tuple[Floats, float]:
    from scipy.optimize import minimize

    result = minimize(
        objective, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 25}
    )
    return result.x, result.fun


def mixing_laws(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    """Data Mixing Laws as published: c + exp(t . r), Huber 0.02, three starts."""

    def curve(theta: Floats, shares: Floats) -> Floats:
        return np.exp(theta[0]) + np.exp(np.minimum(shares @ theta[1:], 50))

    return _fitted(curve, _mixing_start, share, loss, new, huber=0.02)


def additive(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    """Shukor et al.'s additive law with a free outer exponent, without priors, three starts."""
    count = share.shape[1]

    def curve(theta: Floats, shares: Floats) -> Floats:
        powers = np.exp(theta[1 + count : 1 + 2 * count])
        total = (np.exp(theta[1 : 1 + count]) * shares**powers).sum(axis=1)
        return np.exp(theta[0]) + np.maximum(total, 1e-12) ** -np.exp(theta[-1])

    return _fitted(curve, _additive_start, share, loss, new, huber=None)


def bimix_of(own: int) -> Peer:
    """BiMix as published, on one domain's share: r^-alpha (B s^-b + C), Huber 0.01."""

    def peer(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
        def curve(theta: Floats, rows: Floats) -> Floats:
            step_factor = np.exp(theta[1] - np.exp(theta[2]) * rows[:, 1]) + np.exp(theta[3])
            return step_factor * (rows[:, 0] + ZERO) ** -np.exp(theta[0])

        def start(loss: Floats, count: int, random: np.random.Generator) -> Floats:
            usual = np.log(loss.mean())
            middle = np.array([np.log(0.1), usual - 1, np.log(0.3), usual - 0.4])
            return middle + 0.3 * random.normal(size=4)

        rows = [np.stack(pair, axis=1) for pair in ((share[:, own], step), (new[:, own], late))]
        return _fitted(curve, start, rows[0], loss, rows[1], huber=0.01)

    return peer


def joint(share: Floats, step: Floats, loss: Floats, new: Floats, late: Floats) -> Floats:
    """The notes' joint law: E + 1 / sum C_j r_j^g_j + (sum B_j r_j) s^-b, Huber, three starts."""
    count = share.shape[1]

    def curve(theta: Floats, rows: Floats) -> Floats:
        shares, steps = rows[:, :-1] + ZERO, rows[:, -1]
        scale, power, late_part = np.exp(theta[1:-1]).reshape(3, count)
        fall = np.exp(-np.exp(theta[-1]) * steps)
        return (
            np.exp(theta[0]) + 1 / (scale * shares**power).sum(axis=1) + shares @ late_part * fall
        )

    def start(loss: Floats, _: int, random: np.random.Generator) -> Floats:
        middle = np.repeat([0.0, np.log(0.5), np.log(0.3)], count)
        middle += 0.3 * random.normal(size=3 * count)
        return np.concatenate([[np.log(loss.min() / 2)], middle, [np.log(0.4)]])

    rows = [np.column_stack(pair) for pair in ((share, step), (new, late))]
    return _fitted(curve, start, rows[0], loss, rows[1], huber=0.01)


def _mixing_start(loss: Floats, count: int, random: np.random.Generator) -> Floats:
    floor = 0.6 * loss.min()
    level = np.log(loss.mean() - floor)
    return np.concatenate([[np.log(floor)], level + 0.3 * random.normal(size=count)])


def _additive_start(loss: Floats, count: int, random: np.random.Generator) -> Floats:
    floor = 0.6 * loss.min()
    scale = -np.log(loss.mean() - floor) - 0.5 + 0.3 * random.normal(size=count)
    power = np.log(0.5) + 0.3 * random.normal(size=count)
    return np.concatenate([[np.log(floor)], scale, power, [0.0]])


def _fitted(
    curve: Callable[[Floats, Floats], Floats],
    start: Callable[[Floats, int, np.random.Generator], Floats],
    rows: Floats,
    loss: Floats,
    new: Floats,
    *,
    huber: float | None,
) -> Floats:
    random, measured = np.random.default_rng(0), np.log(loss)

    def off(theta: Floats) -> Floats:
        return np.log(np.maximum(curve(theta, rows), 1e-9)) - measured

    measure = {"loss": "huber", "f_scale": huber} if huber else {}
    ends = []
    for _ in range(3):
        first = start(loss, rows.shape[1], random)
        ends.append(least_squares(off, first, max_nfev=100, **measure))
    best = min(ends, key=lambda end: end.cost)
    return curve(best.x, new)
