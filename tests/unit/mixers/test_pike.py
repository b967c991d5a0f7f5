"""PiKE against its closed forms: Example 2.1, one step by hand, where each form ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raymix.mixers import water_fill
from tests.support.mixer_stats import RAW, adaptive, context, window

LOGS = np.log


def one_step(norm2: Any, noise: Any, batch: int = 10, **fields: Any) -> np.ndarray:
    """Return the shares after one update in paper-exact mode, from even shares."""
    n = len(norm2)
    mixer = adaptive("pike", context(n, batch=batch), **{**RAW, **fields})
    return mixer.update(window(n, norm2=norm2, noise=noise))


# -- problem (9) -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_qp_of_example_2_1_is_its_closed_form(seed: int) -> None:
    """Losses (theta e_k)**2 / 2 + x theta: G = theta_k**2, noise 2 sigma_k**2, L = 1; eq. (4)."""
    rng = np.random.default_rng(seed)
    theta, sigma = rng.normal(size=2), 3 * rng.random(2)
    lr, batch = 0.01 + rng.random(), int(rng.integers(1, 100))
    top = (sigma[1] ** 2 - sigma[0] ** 2) / batch + (theta[0] ** 2 - theta[1] ** 2) / lr
    first = np.clip((top + theta[1] ** 2) / (theta**2).sum(), 0, 1)
    share = one_step(
        theta**2, 2 * sigma**2, batch, form="exact_qp", lr=lr, smoothness=1.0, zeta_1=0.3
    )
    assert share == pytest.approx([first, 1 - first], abs=1e-10)


def test_example_2_1_minimizes_the_expected_loss_after_a_step() -> None:
    theta, sigma2, lr, batch = np.array([1.0, 0.8]), np.array([0.5, 4.0]), 0.4, 8
    share = one_step(theta**2, 2 * sigma2, batch, form="exact_qp", lr=lr, smoothness=1.0)

    def after(first: float) -> float:  # eq. (3)
        w = np.array([first, 1 - first])
        noise = lr**2 * (batch * w * sigma2).sum() / batch**2
        return float(((1 - lr * w) ** 2 * theta**2).sum() / 2 + noise)

    best = min(np.linspace(0, 1, 10_001), key=after)
    assert share[0] == pytest.approx(best, abs=1e-4)


@given(
    arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e4, 1e4)),
    st.integers(0, 2**32 - 1),
    st.floats(1e-3, 1e3),
)
def test_water_filling_meets_the_kkt_conditions(linear: np.ndarray, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    curve = size * rng.random(linear.size) * (rng.random(linear.size) < 0.7)
    share = water_fill(linear, curve)
    assert share.min() >= 0
    assert share.sum() == pytest.approx(1)
    slope = linear + curve * share
    used = share > 1e-9
    tolerance = 1e-7 * (np.abs(linear).max() + size)
    assert np.ptp(slope[used]) <= tolerance
    assert slope[~used].min(initial=np.inf) >= slope[used].min() - tolerance


def test_a_domain_without_curvature_takes_what_is_left() -> None:
    assert water_fill(np.array([0.0, 1.0]), np.array([4.0, 0.0])) == pytest.approx([0.25, 0.75])
    assert water_fill(np.array([0.0, 9.0]), np.array([4.0, 0.0])) == pytest.approx([1.0, 0.0])
    assert water_fill(np.zeros(3), np.array([0.0, 0.0, 1.0])) == pytest.approx([0.5, 0.5, 0.0])
    assert water_fill(np.zeros(2), np.zeros(2)) == pytest.approx([0.5, 0.5])


# -- one step by hand ------------------------------------------------------------------------


def test_equal_domains_keep_their_shares() -> None:
    for form in ("simplified", "full"):
        mixer = adaptive("pike", context(3), form=form, initial="uniform")
        assert mixer.update(window(3, norm2=[2] * 3, noise=[5] * 3)).tolist() == [1 / 3] * 3
    raw = adaptive("pike", context(3), **RAW, initial={"d0": 0.5, "d1": 0.3, "d2": 0.2})
    assert raw.update(window(3, norm2=[2] * 3, noise=[5] * 3)).tolist() == [0.5, 0.3, 0.2]


def test_log_odds_rise_by_the_difference_of_norms() -> None:
    share = one_step([3.0, 1.0], [7.0, 7.0], zeta_1=0.2)
    assert LOGS(share[0] / share[1]) == pytest.approx(0.2 * (3 - 1))


def test_log_odds_fall_by_the_difference_of_noise() -> None:
    share = one_step([1.0, 1.0], [70.0, 10.0], batch=16, zeta_2=0.3)
    assert LOGS(share[0] / share[1]) == pytest.approx(-0.3 * (70 - 10) / (2 * 16))


def test_the_full_form_adds_the_curvature_of_what_a_domain_has() -> None:
    share = one_step([3.0, 1.0], [0.0, 0.0], form="full", zeta_1=0.2, zeta_2=0.1, gamma=2.0)
    gain = (0.2 * 3 - 0.1 * 2 * 0.5 * 3) - (0.2 * 1 - 0.1 * 2 * 0.5 * 1)
    assert LOGS(share[0] / share[1]) == pytest.approx(gain)


def test_a_domain_with_neither_gradient_nor_noise_has_factor_one() -> None:
    gaining, losing = one_step([0.0, 9.0], [0.0, 0.0]), one_step([0.0, 0.0], [0.0, 9.0])
    assert gaining[0] < 0.5 < losing[0]
    assert LOGS(gaining[1] / gaining[0]) == pytest.approx(0.1 * 9)


def test_a_huge_batch_removes_the_noise_and_zero_gains_hold_still() -> None:
    assert one_step([1, 1], [1.0, 9e3], batch=10**12) == pytest.approx([0.5, 0.5], abs=1e-9)
    assert one_step([1, 5], [1.0, 90], zeta_1=0, zeta_2=0).tolist() == [0.5, 0.5]


def test_negative_estimates_of_a_norm_count_as_none() -> None:
    assert one_step([-5.0, 2], [0, 0]).tolist() == one_step([0.0, 2], [0, 0]).tolist()


def test_scores_of_ten_thousand_overflow_nothing() -> None:
    assert one_step([1e4, 0.0], [0.0, 0.0], zeta_1=1.0).tolist() == [1.0, 0.0]
    assert one_step([0.0, 0.0], [2e5, 0.0], zeta_2=1.0).tolist() == [0.0, 1.0]
    mixer = adaptive("pike", context(2), **RAW, zeta_1=1.0)
    for norm2 in ([1e4, 0], [0, 1e4], [0, 1]):
        share = mixer.update(window(2, norm2=norm2, noise=[0, 0]))
    # The log weights remember what the shares are too small to hold.
    assert LOGS(share[1] / share[0]) == pytest.approx(1)


def test_unit_free_exponents_do_not_see_the_scale() -> None:
    norm2, noise = np.array([3.0, 1.0, 0.5]), np.array([40.0, 9.0, 11.0])
    fields = {"form": "full", "floor": 0, "max_log_change": None, "stats_ema": 1}
    shares = [
        adaptive("pike", context(3), **fields).update(window(3, norm2=c * norm2, noise=c * noise))
        for c in (1.0, 1e-9, 1e9)
    ]
    assert shares[1] == pytest.approx(shares[0], abs=1e-12)
    assert shares[2] == pytest.approx(shares[0], abs=1e-12)
    size = (norm2 + noise / 10).mean()
    gain = 0.1 * norm2 / size - 0.05 / 20 * noise / size - 0.05 / 3 * norm2 / size
    assert LOGS(shares[0] / shares[0][0]) == pytest.approx(gain - gain[0])


# -- where it ends ---------------------------------------------------------------------------

NORM2, NOISE = [1.0, 0.2, 1.6, 0.3], [6.0, 8.0, 2.0, 30.0]


def test_constant_scores_add_up_in_the_simplified_form() -> None:
    initial = {"d0": 0.1, "d1": 0.2, "d2": 0.3, "d3": 0.4}
    mixer = adaptive("pike", context(4), **RAW, initial=initial, zeta_1=0.02, zeta_2=0.01)
    for _ in range(25):
        share = mixer.update(window(4, norm2=NORM2, noise=NOISE))
    score = 0.02 * np.array(NORM2) - 0.01 / 20 * np.array(NOISE)
    wanted = np.array([0.1, 0.2, 0.3, 0.4]) * np.exp(25 * score)
    assert share == pytest.approx(wanted / wanted.sum(), rel=1e-12)


def test_the_simplified_form_ends_in_a_vertex_and_the_full_one_at_the_optimum() -> None:
    fields = {**RAW, "zeta_1": 1.0, "zeta_2": 1.2}
    qp = one_step(NORM2, NOISE, form="exact_qp", zeta_1=1.0, zeta_2=1.2)
    full = adaptive("pike", context(4), form="full", **fields)
    simplified = adaptive("pike", context(4), **fields)
    for _ in range(800):
        ended = full.update(window(4, norm2=NORM2, noise=NOISE))
        vertex = simplified.update(window(4, norm2=NORM2, noise=NOISE))
    assert vertex == pytest.approx([0, 0, 1, 0], abs=1e-12)
    assert (qp > 0).tolist() == [True, False, True, False]
    assert ended == pytest.approx(qp, abs=1e-8)


def test_rails_keep_the_simplified_form_out_of_the_vertex() -> None:
    mixer = adaptive("pike", context(4), floor=0.08)
    for _ in range(500):
        share = mixer.update(window(4, norm2=NORM2, noise=NOISE))
    assert share.min() >= 0.02
    assert share.argmax() == 2


# -- Balanced-PiKE ---------------------------------------------------------------------------


def test_without_tilt_losses_do_not_matter() -> None:
    plain = adaptive("pike", context(2))
    assert "loss" not in plain.needs
    shares = [
        adaptive("pike", context(2), tau=tau).update(
            window(2, norm2=[2, 1], noise=[1, 2], loss=loss)
        )
        for tau, loss in ((0.0, [9, 1]), (0.0, [1, 9]), (3.0, [4, 4]))
    ]
    assert shares[0].tolist() == shares[1].tolist() == shares[2].tolist()


def test_tilt_weighs_norms_and_noise_by_the_square_of_the_loss_weight() -> None:
    about, losses = context(2), np.array([3.0, 2.0])
    mixer = adaptive("pike", about, **RAW, tau=1.5)
    share = mixer.update(window(2, norm2=[2, 1], noise=[30, 20], loss=losses))
    tilt = 2 * np.exp(1.5 * losses) / np.exp(1.5 * losses).sum()
    score = tilt**2 * (0.1 * np.array([2, 1]) - 0.05 / 20 * np.array([30, 20]))
    assert LOGS(share[0] / share[1]) == pytest.approx(score[0] - score[1])
    assert mixer.loss_weights() == pytest.approx(tilt)
    assert mixer.needs == {"loss", "tokens", "grad_norm2", "grad_noise"}


def test_extreme_tilt_looks_at_the_worst_domain_only() -> None:
    mixer = adaptive("pike", context(3), tau=1e6)
    share = mixer.update(window(3, norm2=[1, 1, 1], noise=[0, 0, 0], loss=[2, 3, 1]))
    assert mixer.loss_weights() == pytest.approx([0, 3, 0])
    assert share.argmax() == 1


def test_loss_weights_ignore_a_shift_of_all_losses_and_targets_count_once() -> None:
    weights_by_shift = []
    for shift in (0.0, 5.0):
        mixer = adaptive("pike", context(3), tau=2.0, targets="d1")
        assert mixer.loss_weights() is None
        mixer.update(window(3, norm2=[1] * 3, noise=[1] * 3, loss=[1 + shift, 9, 2 + shift]))
        weights = mixer.loss_weights()
        assert weights is not None
        weights_by_shift.append(weights)
    assert weights_by_shift[0] == pytest.approx(weights_by_shift[1])
    assert weights_by_shift[0][1] == 1
    assert weights_by_shift[0][[0, 2]].mean() == pytest.approx(1)


def test_loss_weights_can_be_left_out_and_wait_for_the_warm_up() -> None:
    stats = window(2, norm2=[1, 1], noise=[1, 1], loss=[1, 2])
    without = adaptive("pike", context(2), tau=2.0, loss_weights=False)
    without.update(stats)
    assert without.loss_weights() is None
    early = adaptive("pike", context(2), tau=2.0, warmup_steps=10)
    early.update(stats)
    assert early.loss_weights() is None


def test_tilt_by_held_out_loss() -> None:
    mixer = adaptive("pike", context(2), tau=1.0, loss="valid")
    assert "valid_loss" in mixer.needs
    mixer.update(window(2, norm2=[1, 1], noise=[1, 1], loss=[1, 9], valid=[9, 1]))
    weights = mixer.loss_weights()
    assert weights is not None
    assert weights[0] > 1.9
