"""Curves and how they are fitted: against scipy, one by one, with weights, outliers and draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from raymix.laws.models.curves import AdditiveCurve, BiMixCurve, ExponentialCurve
from raymix.laws.models.least_squares import (
    INITIAL_SCALE,
    Curve,
    CurveFits,
    Inputs,
    bootstrap,
    fit_curves,
)
from raymix.laws.table import Floats
from tests.support.tables import draw_shares

NAMES = ("a", "b", "c")
OWN = np.array([0, 2])
CURVES: dict[str, Curve] = {
    "bimix": BiMixCurve(OWN, 0.01, steps=True),
    "exponential": ExponentialCurve(NAMES, steps=True),
    "additive": AdditiveCurve(NAMES, OWN, steps=True, joint=False),
    "joint": AdditiveCurve(NAMES, OWN, steps=True, joint=True),
}


def some_inputs(runs: int, *, seed: int = 0, zeros: float = 0.0) -> Inputs:
    share = np.repeat(draw_shares(runs, 3, seed=seed, zeros=zeros), 3, axis=0)
    return Inputs(share, np.tile([-0.7, 0.0, 0.7], runs))


def noisy(runs: int, noise: float, *, seed: int = 0) -> tuple[Inputs, Floats]:
    """Return rows, and log losses of two targets that no curve fits exactly, shape (2, N)."""
    inputs = some_inputs(runs, seed=seed)
    own = inputs.share_ND[:, OWN].T
    loss = 2.0 + 0.5 * (own + 0.3 * inputs.share_ND[:, 1] + 0.1) ** -0.5
    loss += 0.4 * np.exp(-0.5 * inputs.log_step_N)
    random = np.random.default_rng(seed + 1)
    return inputs, np.log(loss) + noise * random.normal(size=loss.shape)


def some_theta(curve: Curve, seed: int = 0) -> Floats:
    return 0.3 * np.random.default_rng(seed).normal(size=(2, len(curve.names)))


@pytest.mark.parametrize("kind", CURVES)
def test_the_fit_is_the_least_squares_of_scipy_with_the_prior_as_rows(kind: str) -> None:
    curve = CURVES[kind]
    inputs, y_BN = noisy(8, 0.01)
    actual = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN), rounds=0)
    for at in range(2):
        which = np.array([at])

        def residuals(theta_P: Floats, at: int = at, which: np.ndarray = which) -> Floats:
            off_N = (curve.evaluate(theta_P[None], inputs, which)[0][0] - y_BN[at]) / INITIAL_SCALE
            return np.concatenate([off_N, (theta_P - actual.mean_BP[at]) / actual.sd_P])

        best = least_squares(residuals, actual.mean_BP[at], xtol=1e-14, ftol=1e-14, gtol=1e-10)
        assert actual.cost_B[at] <= best.cost * (1 + 1e-5)
        ours, theirs = (
            curve.evaluate(theta[None], inputs, which)[0] for theta in (actual.theta_BP[at], best.x)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", CURVES)
def test_problems_of_a_batch_do_not_know_each_other(kind: str) -> None:
    curve = CURVES[kind]
    inputs, y_BN = noisy(8, 0.01)
    use_BN = (np.random.default_rng(3).random((4, y_BN.shape[1])) < 0.8).astype(float)
    together = fit_curves(curve, inputs, np.tile(y_BN, (2, 1)), use_BN)
    for half in (slice(0, 2), slice(2, 4)):
        apart = fit_curves(curve, inputs, y_BN, use_BN[half])
        mine = together.select(half)
        np.testing.assert_allclose(mine.theta_BP, apart.theta_BP, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(mine.scale_B, apart.scale_B, rtol=1e-9)
        np.testing.assert_allclose(mine.cost_B, apart.cost_B, rtol=1e-9)


@pytest.mark.parametrize("kind", ["bimix", "exponential"])
def test_a_row_without_weight_is_a_row_that_is_not_there(kind: str) -> None:
    """Its loss may be anything, NaN too."""
    curve = CURVES[kind]
    inputs, y_BN = noisy(10, 0.01)
    use_BN = np.ones_like(y_BN)
    use_BN[:, 21:] = 0
    wild_BN = np.where(use_BN > 0, y_BN, np.nan)
    masked = fit_curves(curve, inputs, wild_BN, use_BN)
    cut = fit_curves(curve, inputs.rows(np.arange(21)), y_BN[:, :21], use_BN[:, :21])
    np.testing.assert_allclose(masked.theta_BP, cut.theta_BP, rtol=1e-9)
    np.testing.assert_array_equal(masked.weight_BN[:, 21:], 0)


def test_a_weight_of_two_is_the_row_twice() -> None:
    inputs, y_BN = noisy(6, 0.01)
    use_BN = np.ones_like(y_BN)
    use_BN[:, :6] = 2
    twice = np.concatenate([np.arange(6), np.arange(18)])
    weighted = fit_curves(CURVES["bimix"], inputs, y_BN, use_BN, rounds=0)
    repeated = fit_curves(
        CURVES["bimix"], inputs.rows(twice), y_BN[:, twice], np.ones((2, 24)), rounds=0
    )
    # Priors look at means over rows, which the repeats move a little.
    np.testing.assert_allclose(weighted.cost_B, repeated.cost_B, rtol=1e-4)
    np.testing.assert_allclose(weighted.theta_BP, repeated.theta_BP, atol=2e-2)


def planted(curve: Curve, runs: int, noise: float, *, seed: int = 0) -> tuple[Inputs, Floats]:
    inputs = some_inputs(runs, seed=seed)
    truth_BP = np.array([[-2.0, 0.5, -0.5, -1.0], [-1.5, 0.7, -0.2, -0.7]])
    y_BN = curve.evaluate(truth_BP, inputs)[0]
    return inputs, y_BN + noise * np.random.default_rng(seed).normal(size=y_BN.shape)


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_one_wild_loss_moves_little(error: float) -> None:
    curve = CURVES["bimix"]
    inputs, y_BN = planted(curve, 12, 0.003)
    clean = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN))
    y_BN[0, 7] += error
    wild = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN))
    at, before = (curve.evaluate(f.theta_BP, inputs)[0] for f in (wild, clean))
    assert np.abs(at - before)[0].max() < 0.01
    assert wild.scale_B[0] < 2 * 0.003
    assert wild.weight_BN[0, 7] < 0.1 * np.median(wild.weight_BN[0])
    np.testing.assert_array_equal(wild.theta_BP[1], clean.theta_BP[1])


@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_the_scale_is_that_of_the_noise(noise: float) -> None:
    curve = CURVES["bimix"]
    inputs, y_BN = planted(curve, 60, noise)
    actual = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN))
    np.testing.assert_allclose(actual.scale_B, noise, rtol=0.25)


@pytest.mark.parametrize("kind", CURVES)
def test_a_fit_that_begins_at_another_ends_where_it_would_without(kind: str) -> None:
    curve = CURVES[kind]
    inputs, y_BN = noisy(14, 0.005)
    use_BN = np.ones_like(y_BN)
    whole = fit_curves(curve, inputs, y_BN, use_BN)
    use_BN[:, ::7] = 0
    fresh = fit_curves(curve, inputs, y_BN, use_BN)
    warm = fit_curves(curve, inputs, y_BN, use_BN, warm_start=whole)
    np.testing.assert_array_equal(warm.mean_BP, whole.mean_BP)
    losses = [curve.evaluate(f.theta_BP, inputs)[0] for f in (warm, fresh)]
    np.testing.assert_allclose(losses[0], losses[1], atol=0.005)


def test_copies_of_a_fit_are_the_fit_over_again() -> None:
    inputs, y_BN = noisy(6, 0.01)
    actual = fit_curves(CURVES["bimix"], inputs, y_BN, np.ones_like(y_BN))
    thrice = actual.tile(3)
    for at in range(3):
        part = thrice.select(slice(2 * at, 2 * at + 2))
        for name in CurveFits.__slots__:
            np.testing.assert_array_equal(getattr(part, name), getattr(actual, name))


def test_bootstrap_intervals_shrink_with_the_root_of_the_rows() -> None:
    curve = CURVES["bimix"]
    widths = []
    for runs in (40, 640):
        inputs, y_BN = planted(curve, runs, 0.003)
        actual = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN))
        draws = np.random.default_rng(0).standard_exponential((60, y_BN.shape[1]))
        widths.append(bootstrap(curve, inputs, y_BN, actual, draws)[:, :, 0].std(axis=0))
    # Sixteen times the rows: a quarter of the width.
    np.testing.assert_allclose(widths[1] / widths[0], 0.25, atol=0.1)


def test_draws_of_ones_leave_the_fit_where_it_is() -> None:
    curve = CURVES["bimix"]
    inputs, y_BN = planted(curve, 12, 0.01)
    actual = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN))
    again = bootstrap(curve, inputs, y_BN, actual, np.ones((1, y_BN.shape[1])))
    np.testing.assert_allclose(again[0], actual.theta_BP, atol=2e-3)


@pytest.mark.parametrize("kind", CURVES)
def test_the_slopes_in_shares_are_derivatives(kind: str) -> None:
    curve, inputs = CURVES[kind], some_inputs(3)
    theta_BP = some_theta(curve)
    loss_BN, slope_BND = curve.share_gradient(theta_BP, inputs)
    np.testing.assert_allclose(loss_BN, np.exp(curve.evaluate(theta_BP, inputs)[0]), rtol=1e-12)
    for domain in range(3):
        nudge = 1e-6 * np.eye(3)[domain]
        up, down = (
            np.exp(
                curve.evaluate(theta_BP, Inputs(inputs.share_ND + s * nudge, inputs.log_step_N))[0]
            )
            for s in (1, -1)
        )
        np.testing.assert_allclose(slope_BND[:, :, domain], (up - down) / 2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", CURVES)
def test_absent_domains_have_finite_slopes_that_do_not_help_less(kind: str) -> None:
    """At a share of zero: the slope of r^g with g < 1 is infinite, and is taken a little above."""
    curve = CURVES[kind]
    inputs = Inputs(np.eye(3), np.zeros(3))
    theta_BP = some_theta(curve)
    if isinstance(curve, AdditiveCurve):
        theta_BP[:, 6:9] = -0.5
    loss_BN, slope_BND = curve.share_gradient(theta_BP, inputs)
    assert np.isfinite(loss_BN).all()
    assert np.isfinite(slope_BND).all()
    if kind in ("bimix", "additive"):
        assert (slope_BND <= 0).all()
        own = slope_BND[np.arange(2), :, OWN]
        assert (own[0, 1:] < own[0, 0]).all()


@pytest.mark.parametrize("kind", ["bimix", "exponential", "additive", "joint"])
@settings(max_examples=8)
@given(seed=st.integers(0, 999))
def test_every_formula_is_convex(kind: str, seed: int) -> None:
    """On the way between two mixtures no loss is above the straight line."""
    curve = CURVES[kind]
    theta_BP = some_theta(curve, seed)
    first, second = draw_shares(2, 3, seed=seed, zeros=0.2)
    way = np.linspace(0, 1, 9)[:, None]
    loss_BN = np.exp(
        curve.evaluate(theta_BP, Inputs(first + way * (second - first), np.zeros(9)))[0]
    )
    line_BN = loss_BN[:, :1] + way[:, 0] * (loss_BN[:, -1:] - loss_BN[:, :1])
    assert (loss_BN <= line_BN * (1 + 1e-12)).all()


@settings(max_examples=12)
@given(k=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_a_factor_of_the_exponential_is_a_shift_of_its_slopes(k: float, seed: int) -> None:
    """k exp(t . r) = exp((t + log k) . r), since shares sum to 1: the published k is redundant."""
    curve, inputs = ExponentialCurve(NAMES, steps=False), Inputs(draw_shares(5, 3), np.zeros(5))
    theta_BP = some_theta(curve, seed)
    theta_BP = theta_BP[:, : len(curve.names)]
    floor_B1, mixed_BN = np.exp(theta_BP[:, :1]), np.exp(theta_BP[:, 1:] @ inputs.share_ND.T)
    moved_BP = theta_BP + np.array([0.0, 1, 1, 1]) * np.log(k)
    actual = np.exp(curve.evaluate(moved_BP, inputs)[0])
    np.testing.assert_allclose(actual, floor_B1 + k * mixed_BN, rtol=1e-12)


def test_bimix_without_steps_is_a_power_of_the_own_share() -> None:
    curve, inputs = BiMixCurve(OWN, 0.02, steps=False), Inputs(draw_shares(6, 3), np.zeros(6))
    assert curve.names == ("log_alpha", "log_C")
    alpha, scale = np.array([0.1, 0.3]), np.array([2.0, 3.0])
    theta_BP = np.log(np.stack([alpha, scale], axis=1))
    expected = scale[:, None] * (inputs.share_ND[:, OWN].T + 0.02) ** -alpha[:, None]
    np.testing.assert_allclose(np.exp(curve.evaluate(theta_BP, inputs)[0]), expected, rtol=1e-12)
    y_BN = np.log(expected)
    actual = fit_curves(curve, inputs, y_BN, np.ones_like(y_BN))
    np.testing.assert_allclose(actual.theta_BP, theta_BP, atol=5e-3)


def test_bimix_without_an_addition_has_no_finite_loss_of_an_absent_domain() -> None:
    curve = BiMixCurve(OWN, 0.0, steps=True)
    loss_BN = np.exp(curve.evaluate(np.zeros((2, 4)), Inputs(np.eye(3), np.zeros(3)))[0])
    np.testing.assert_array_equal(np.isinf(loss_BN), [[False, True, True], [True, True, False]])


def test_the_joint_curve_with_even_late_terms_is_the_additive_one() -> None:
    """With all B_j alike and k = 0 the shares leave the term in steps, as they sum to 1."""
    plain, joint, inputs = CURVES["additive"], CURVES["joint"], some_inputs(5)
    theta_BP = some_theta(plain)
    wide_BP = np.concatenate([theta_BP, theta_BP[:, -1:], theta_BP[:, -1:], np.zeros((2, 1))], 1)
    np.testing.assert_allclose(
        joint.evaluate(wide_BP, inputs)[0], plain.evaluate(theta_BP, inputs)[0], rtol=1e-12
    )


def test_problem_b_is_about_target_b_modulo_the_targets() -> None:
    curve, inputs = CURVES["bimix"], some_inputs(4)
    theta_BP = np.tile(some_theta(curve)[:1], (4, 1))
    every_BN, _ = curve.evaluate(theta_BP, inputs)
    np.testing.assert_array_equal(every_BN[:2], every_BN[2:])
    assert (every_BN[0] != every_BN[1]).any()
    some_BN, _ = curve.evaluate(theta_BP[:2], inputs, np.array([1, 3]))
    np.testing.assert_array_equal(some_BN, every_BN[[1, 3]])
