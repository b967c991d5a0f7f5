"""The process around a curve: what it is without data, near data, far from data, in the limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from raymix.laws.models import gp_law as gp
from raymix.laws.models.fitted_law import make_training_table
from raymix.laws.models.gaussian_process import (
    Hyper,
    Process,
    ProcessRows,
    condition,
    covariance,
    fit_process,
    hyper_prior,
    negative_log_posterior,
)
from raymix.laws.models.gp_law import ProcessSolver
from raymix.laws.models.parametric import CurveSolver
from raymix.laws.table import Floats
from tests.support.tables import AdditiveTruth, BiMixTruth, draw_shares

HYPER = Hyper(np.log([0.5, 0.7, 0.4]), np.log(0.1), np.log(0.01), 0.0, 0.0)


def some_rows(count: int, *, seed: int = 0, steps: bool = True) -> ProcessRows:
    random = np.random.default_rng(seed)
    return ProcessRows(
        root_ND=np.sqrt(draw_shares(count, 3, seed=seed)),
        log_step_N=random.normal(size=count) * steps,
        level_N=random.normal(size=count),
        residual_N=0.1 * random.normal(size=count),
        scaled_jac_NP=0.05 * random.normal(size=(count, 2)),
        robust_weight_N=random.uniform(0.5, 1.25, count),
    )


def without_trend(rows: ProcessRows) -> ProcessRows:
    return replace(rows, scaled_jac_NP=np.zeros_like(rows.scaled_jac_NP))


def test_the_covariance_is_a_matern_by_the_formula() -> None:
    rows = some_rows(4)
    root_D, step = np.sqrt([0.2, 0.3, 0.5]), 0.4
    actual = covariance(HYPER, root_D[None], np.array([step]), rows)[0]
    for at in range(4):
        apart = (root_D - rows.root_ND[at]) / np.exp(HYPER.length_D)
        far = np.sqrt(5) * np.linalg.norm(apart)
        late = np.sqrt(3) * abs(step - rows.log_step_N[at])
        expected = 0.1**2 * (1 + far + far**2 / 3) * np.exp(-far) * (1 + late) * np.exp(-late)
        assert actual[at] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_covariances_are_symmetric_and_positive(seed: int) -> None:
    rows = some_rows(30, seed=seed)
    kernel_NN = covariance(HYPER, rows.root_ND, rows.log_step_N, rows)
    np.testing.assert_allclose(kernel_NN, kernel_NN.T, atol=1e-15)
    # A distance to oneself is the root of a difference of sums, known to eight digits.
    np.testing.assert_allclose(kernel_NN.diagonal(), 0.1**2, rtol=1e-6)
    assert np.linalg.eigvalsh(kernel_NN).min() > -1e-8 * 0.1**2


def test_the_evidence_is_the_density_of_a_normal_and_the_prior() -> None:
    rows = some_rows(12)
    trend_NN = rows.scaled_jac_NP @ rows.scaled_jac_NP.T
    mean_H, sd_H = hyper_prior(3, 0.1)
    ours, theirs = [], []
    for vector_H in (HYPER.vector, mean_H + 0.2):
        hyper = Hyper.of(vector_H)
        total_NN = covariance(hyper, rows.root_ND, rows.log_step_N, rows) + trend_NN
        total_NN += np.diag(
            np.exp(2 * (hyper.noise + hyper.slope * rows.level_N)) / rows.robust_weight_N
        )
        density = multivariate_normal(np.zeros(12), total_NN).logpdf(rows.residual_N)
        prior = -0.5 * np.square((vector_H - mean_H) / sd_H).sum()
        theirs.append(-density - prior)
        ours.append(negative_log_posterior(vector_H, rows, trend_NN, mean_H, sd_H)[0])
    # Up to a constant.
    assert ours[1] - ours[0] == pytest.approx(theirs[1] - theirs[0], rel=1e-9)


def test_without_a_step_the_length_in_steps_has_no_voice() -> None:
    rows = some_rows(12, steps=False)
    mean_H, sd_H = hyper_prior(3, 0.1)
    value, gradient = negative_log_posterior(mean_H, rows, np.zeros((12, 12)), mean_H, sd_H)
    other_H = mean_H + np.eye(mean_H.size)[-1]
    moved, _ = negative_log_posterior(other_H, rows, np.zeros((12, 12)), mean_H, sd_H)
    assert gradient[-1] == 0
    # Nothing but the prior changed.
    assert moved - value == pytest.approx(0.5 / sd_H[-1] ** 2)


def test_the_likeliest_hyper_parameters_are_where_the_gradient_is_small() -> None:
    rows = replace(some_rows(40), robust_weight_N=np.ones(40))
    process = fit_process(rows, 0.1)
    trend_NN = rows.scaled_jac_NP @ rows.scaled_jac_NP.T
    mean_H, sd_H = hyper_prior(3, 0.1)
    at_start, _ = negative_log_posterior(mean_H, rows, trend_NN, mean_H, sd_H)
    at_end, _ = negative_log_posterior(process.hyper.vector, rows, trend_NN, mean_H, sd_H)
    assert at_end < at_start
    assert 0.04 < np.exp(process.hyper.noise) < 0.2


def test_nearly_without_noise_it_goes_through_the_data() -> None:
    rows = some_rows(20)
    process = condition(replace(HYPER, noise=np.log(1e-6)), rows)
    actual = process.mean(rows.root_ND, rows.log_step_N) + rows.scaled_jac_NP @ process.shift_P
    np.testing.assert_allclose(actual, rows.residual_N, atol=1e-5)
    deviation = process.deviation(rows.root_ND, rows.log_step_N, rows.scaled_jac_NP)
    assert deviation.max() < 1e-4


def test_the_deviation_grows_away_from_the_data_up_to_the_prior() -> None:
    rows = without_trend(some_rows(1))
    process = condition(replace(HYPER, noise=np.log(1e-6)), rows)
    away_M = np.array([0.0, 0.1, 0.3, 1.0, 3.0, 30.0])
    root_MD = np.repeat(rows.root_ND, len(away_M), axis=0)
    deviation = process.deviation(root_MD, rows.log_step_N + away_M, np.zeros((6, 2)))
    assert (np.diff(deviation) > 0).all()
    assert deviation[0] < 1e-4
    assert deviation[-1] == pytest.approx(0.1, rel=1e-6)
    mean = process.mean(root_MD, rows.log_step_N + away_M)
    assert mean[0] == pytest.approx(rows.residual_N[0], rel=1e-6)
    assert mean[-1] == pytest.approx(0, abs=1e-9)


def test_mean_and_deviation_are_those_of_a_conditional_normal() -> None:
    rows, new = some_rows(10), some_rows(3, seed=1)
    combined = ProcessRows(
        *(np.concatenate([getattr(rows, n), getattr(new, n)]) for n in ProcessRows.__slots__)
    )
    joint = covariance(HYPER, combined.root_ND, combined.log_step_N, combined)
    joint += combined.scaled_jac_NP @ combined.scaled_jac_NP.T
    seen = joint[:10, :10] + np.diag(HYPER.noise_at(rows.level_N, rows.robust_weight_N))
    across = np.linalg.solve(seen, joint[:10, 10:]).T
    process = condition(HYPER, rows)
    mean = process.mean(new.root_ND, new.log_step_N) + new.scaled_jac_NP @ process.shift_P
    np.testing.assert_allclose(mean, across @ rows.residual_N, rtol=1e-8)
    deviation = process.deviation(new.root_ND, new.log_step_N, new.scaled_jac_NP)
    variance = (joint[10:, 10:] - across @ joint[:10, 10:]).diagonal()
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-6)


def test_with_no_amplitude_the_rows_move_the_coefficients_as_ridge_does() -> None:
    rows = some_rows(15)
    process = condition(replace(HYPER, amplitude=np.log(1e-7)), rows)
    over_N = 1 / HYPER.noise_at(rows.level_N, rows.robust_weight_N)
    normal_PP = (rows.scaled_jac_NP.T * over_N) @ rows.scaled_jac_NP + np.eye(2)
    ridge_P = np.linalg.solve(normal_PP, rows.scaled_jac_NP.T @ (over_N * rows.residual_N))
    np.testing.assert_allclose(process.shift_P, ridge_P, rtol=1e-6)
    np.testing.assert_allclose(process.mean(rows.root_ND, rows.log_step_N), 0, atol=1e-9)


def test_the_slope_of_the_mean_is_its_derivative() -> None:
    process = condition(HYPER, some_rows(15))
    share_D, step = np.array([0.2, 0.5, 0.3]), np.array([0.3])
    actual = process.gradient(share_D, 0.3)
    for domain in range(3):
        nudge = 1e-6 * np.eye(3)[domain]
        up, down = (process.mean(np.sqrt(share_D + s * nudge)[None], step)[0] for s in (1, -1))
        assert actual[domain] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)
    assert np.isfinite(process.gradient(np.array([0.0, 1.0, 0.0]), 0.3)).all()


def test_rows_in_doubt_pull_less() -> None:
    rows = without_trend(some_rows(8))
    sure, doubted = (
        condition(HYPER, replace(rows, robust_weight_N=np.where(np.arange(8) == 3, d, 1.0)))
        for d in (1.0, 1e-4)
    )
    at = (rows.root_ND[3:4], rows.log_step_N[3:4])
    off = [abs(process.mean(*at)[0] - rows.residual_N[3]) for process in (sure, doubted)]
    assert off[0] < 0.1 * off[1]


def test_an_outlier_is_doubted() -> None:
    rows = some_rows(40)
    smooth_N = 0.1 * rows.root_ND[:, 0] ** 2
    noise_N = 0.002 * np.random.default_rng(1).normal(size=40)
    residual_N = smooth_N + noise_N + np.where(np.arange(40) == 11, 0.3, 0.0)
    process = fit_process(replace(rows, residual_N=residual_N, robust_weight_N=np.ones(40)), 0.005)
    assert process.rows.robust_weight_N.argmin() == 11
    assert process.rows.robust_weight_N[11] < 0.5 * np.median(process.rows.robust_weight_N)


def test_some_rows_are_evenly_taken() -> None:
    rows = some_rows(100)
    assert rows.subsample(100) is rows
    few = rows.subsample(10)
    np.testing.assert_array_equal(few.residual_N, rows.residual_N[::10])
    assert few.scaled_jac_NP.shape == (10, 2)


def test_hyper_parameters_and_their_vector_are_the_same() -> None:
    vector_H = np.arange(7.0)
    np.testing.assert_array_equal(Hyper.of(vector_H).vector, vector_H)


def processes(solver: ProcessSolver) -> list[Process]:
    return [target.process for target in solver._targets]


def test_of_a_law_that_is_exact_the_process_says_nothing() -> None:
    """An additive table without noise: the prediction is that of the curve."""
    truth = AdditiveTruth(3)
    data = make_training_table(truth.table(24).with_targets(["d0"]))
    solver, curve = ProcessSolver(), CurveSolver("joint")
    solver.learn(data)
    curve.learn(data)
    inputs = make_training_table(truth.table(24, seed=5)).inputs
    off_NV = solver.losses(inputs) / curve.losses(inputs) - 1
    assert np.median(np.abs(off_NV)) < 0.002
    assert np.exp(processes(solver)[0].hyper.amplitude) < 0.02


def test_with_many_rows_what_is_left_out_is_conditioned_on_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The block of the inverse says what conditioning on the other rows says."""
    monkeypatch.setattr(gp, "MAX_REFIT_ROWS", 10)
    table = AdditiveTruth(3).table(24, noise=0.01).with_targets(["d0", "d1"])
    table.loss_RV[4, 1] = np.nan
    data, use_R = make_training_table(table), np.arange(24) % 4 != 0
    solver = ProcessSolver()
    solver.learn(data)
    actual_RV = solver.held_out(data, use_R[None])[0]
    assert np.isnan(actual_RV[use_R]).all()
    for at, process in enumerate(processes(solver)):
        seen_R = np.isfinite(data.log_loss_VR[at])
        used_N, rows = use_R[seen_R], process.rows
        used = ProcessRows(*(getattr(rows, name)[used_N] for name in ProcessRows.__slots__))
        apart = condition(process.hyper, used)
        predicted_N = apart.mean(rows.root_ND, rows.log_step_N) + rows.scaled_jac_NP @ apart.shift_P
        # What the process calls left is the log loss, less the curve at its prior mean.
        log_N: Floats = data.log_loss_VR[at, seen_R] - rows.residual_N + predicted_N
        out_R = seen_R & ~use_R
        np.testing.assert_allclose(actual_RV[out_R, at], np.exp(log_N[~used_N]), rtol=1e-7)


def test_folds_of_few_rows_know_nothing_of_what_is_left_out() -> None:
    """Changing a loss that is left out changes no prediction of it beyond the starting point."""
    table = BiMixTruth(3).table(6, noise=0.01).with_targets(["d1"])
    use_R = np.array([run != table.runs[0] for run in table.runs])
    solver, data = ProcessSolver(), make_training_table(table)
    solver.learn(data)
    actual_FRV = solver.held_out(data, np.stack([use_R, use_R]))
    np.testing.assert_array_equal(actual_FRV[0], actual_FRV[1])
    changed = replace(data, log_loss_VR=np.where(use_R, data.log_loss_VR, 9.9))
    again_FRV = solver.held_out(changed, use_R[None])
    np.testing.assert_allclose(again_FRV[0], actual_FRV[0], rtol=1e-9)
