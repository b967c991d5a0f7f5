"""DoGE, DoReMi, ODM, ADO, R&B and Aioli-style: steps computed by hand, fits of known curves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raymix.errors import RecipeError
from raymix.mixers import PowerLaws, build_mixer, fit_power_laws
from tests.support.mixer_stats import CONFIG, RAW, adaptive, context, continued, window


def log_odds(share: np.ndarray) -> np.ndarray:
    return np.log(share / share[0])


# -- DoGE ------------------------------------------------------------------------------------

GRAM = np.array([[4.0, 1.0, -1.0], [1.0, 1.0, 0.5], [-1.0, 0.5, 0.25]])


def test_doge_scores_a_domain_by_all_others_over_the_mean_norm() -> None:
    share = adaptive("doge", context(3), **RAW, clip_norm=None, step=0.3).update(
        window(3, gram=GRAM)
    )
    # Others only: 0, 1.5 and -0.5, which counts as 0; the mean norm is (2 + 1 + 0.5) / 3.
    assert log_odds(share) == pytest.approx([0, 0.3 * 1.5 / (3.5 / 3), 0])
    own = adaptive("doge", context(3), **RAW, clip_norm=None, step=0.3, self_term=True)
    scores = 0.3 * np.array([4.0, 2.5, 0.0]) / (3.5 / 3)
    assert log_odds(own.update(window(3, gram=GRAM))) == pytest.approx(scores - scores[0])


def test_doge_clips_gradients_and_scores() -> None:
    share = adaptive("doge", context(3), **RAW, clip_norm=1.0, step=1.0).update(
        window(3, gram=GRAM)
    )
    # Domain 0 is halved: its products too; norms 1, 1, 0.5.
    scores = np.array([0.5 - 0.5, 0.5 + 0.5, 0.0]) / (2.5 / 3)
    assert log_odds(share) == pytest.approx(scores - scores[0])
    huge = adaptive("doge", context(2), **RAW, clip_norm=None, step=1.0, targets="d1")
    assert huge.update(window(2, gram=[[1, 900], [900, 1]])).tolist() == [1, 0]
    capped = adaptive("doge", context(3), **RAW, clip_norm=None, step=1.0, targets="d2")
    gram = [[1, 0, 90], [0, 1, 0], [90, 0, 1]]
    assert log_odds(capped.update(window(3, gram=gram))[:2]) == pytest.approx([0, -5])


# -- R&B -------------------------------------------------------------------------------------


def test_rb_is_a_softmax_of_the_normalized_alignment_and_remembers_nothing() -> None:
    mixer = adaptive("rb", context(3), **RAW, scale=3.0, eval_shares={"d0": 0.2, "d2": 0.8})
    mixer.update(window(3, gram=np.eye(3)))
    share = mixer.update(window(3, gram=GRAM))
    aligned = GRAM @ np.array([0.2, 0, 0.8])
    scores = 3 * aligned / np.linalg.norm(aligned)
    assert log_odds(share) == pytest.approx(scores - scores[0])


def test_rb_by_default_looks_at_the_targets_else_at_all() -> None:
    for targets, aligned in (("d2", GRAM[:2, 2]), ((), GRAM.mean(axis=1))):
        mixer = adaptive("rb", context(3), **RAW, targets=targets)
        share = mixer.update(window(3, gram=GRAM))[: aligned.size]
        scores = 3 * aligned / np.linalg.norm(aligned)
        assert log_odds(share) == pytest.approx(scores - scores[0])


def test_rb_keeps_its_shares_where_nothing_is_aligned() -> None:
    mixer = adaptive("rb", context(2), initial={"d0": 0.8, "d1": 0.2}, **RAW)
    assert mixer.update(window(2, gram=np.zeros((2, 2)))) == pytest.approx([0.8, 0.2])


# -- DoReMi and Sheared-LLaMA ----------------------------------------------------------------

REFERENCE = {"d0": 2.0, "d1": 2.0, "d2": 3.0}


def test_doremi_follows_excess_loss_and_sheared_llama_the_gap() -> None:
    stats = window(3, loss=[2.5, 1.0, 3.1], valid=[2.0, 2.2, 3.3])
    excess = adaptive("doremi", context(3), **RAW, reference=REFERENCE, step=2.0).update(stats)
    assert log_odds(excess) == pytest.approx([0, -1.0, -0.8])
    gap = adaptive("doremi", context(3), **RAW, reference=REFERENCE, form="gap").update(stats)
    assert log_odds(gap) == pytest.approx([0, -1.5, -0.4])
    valid = adaptive("doremi", context(3), **RAW, reference=REFERENCE, form="gap", loss="valid")
    assert valid.needs == {"valid_loss", "tokens"}
    assert log_odds(valid.update(stats)) == pytest.approx([0, 0.2, 0.3])


def test_doremi_smooths_toward_uniform() -> None:
    fields = {"reference": REFERENCE, "floor": 0.3, "stats_ema": 1, "max_log_change": None}
    share = adaptive("doremi", context(3), **fields).update(window(3, loss=[99.0, 0, 0]))
    assert share == pytest.approx([0.8, 0.1, 0.1])


def test_a_missing_domain_keeps_its_last_score() -> None:
    mixer = adaptive("doremi", context(3), **RAW, reference=REFERENCE)
    first = mixer.update(window(3, loss=[3.0, 2.5, 3.1]))
    second = mixer.update(window(3, loss=[2.0, np.nan, 3.0], tokens=[5, 0, 5]))
    assert np.log(second / first)[1] - np.log(second / first)[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        ({"d0": 1.0, "d1": 2.0}, r"mixer\.reference = .*: 1 domains have no value.*missing: d2"),
        (REFERENCE | {"d02": 1.0}, r"mixer\.reference\.d02 = 1\.0: .*Did you mean 'd"),
    ],
)
def test_references_of_the_wrong_domains(reference: dict[str, float], wrong: str) -> None:
    config = CONFIG.validate_python({"kind": "doremi", "reference": reference})
    with pytest.raises(RecipeError, match=wrong):
        build_mixer(config, context(3))


def test_a_target_needs_no_reference() -> None:
    mixer = adaptive("doremi", context(4), reference=REFERENCE, targets="d3")
    assert mixer.update(window(4, tokens=[1, 1, 1, 0], loss=[2, 2, 2, np.nan]))[3] == 0


# -- ODM -------------------------------------------------------------------------------------


def test_exp3_by_hand() -> None:
    mixer = adaptive("odm", context(2), **RAW)
    tokens, losses = np.array([30, 10]), np.array([2.0, 3.0])
    reward = np.zeros(2)
    for t in range(1, 40):
        share = mixer.update(window(2, tokens=tokens, loss=losses))
        reward += losses / 10 / (tokens / 40)
        now = min(0.5, np.sqrt(np.log(2) / (2 * t)))
        before = min(0.5, np.sqrt(np.log(2) / (2 * (t - 1)))) if t > 1 else 0.5
        greedy = np.exp(before * (reward - reward.max()))
        assert share == pytest.approx((1 - 2 * now) * greedy / greedy.sum() + now)
    assert now < 0.1
    assert share[1] > 0.85


def test_the_smoothed_mean_by_hand() -> None:
    mixer = adaptive("odm", context(2), **RAW, form="smoothed_mean")
    mean, losses = np.zeros(2), np.array([2.0, 3.0])
    for t in range(1, 20):
        share = mixer.update(window(2, loss=losses))
        mean = 0.9 * mean + 0.1 * np.exp(losses)
        explore = min(0.5, np.sqrt(np.log(2) / (2 * t)))
        assert share == pytest.approx((1 - 2 * explore) * mean / mean.sum() + explore)


def test_a_domain_that_was_not_read_gets_no_reward() -> None:
    for form in ("exp3", "smoothed_mean"):
        mixer = adaptive("odm", context(2), **RAW, form=form)
        for _ in range(30):
            share = mixer.update(window(2, tokens=[5, 0], loss=[2.0, np.nan]))
        assert share[0] > 0.6


# -- ADO -------------------------------------------------------------------------------------


def test_known_power_laws_are_found_again() -> None:
    floor, scale, power = np.array([1.2, 0.3, 2.0, 0.0]), np.array([30, 8, 500, 4.0]), np.array(
        [0.31, 0.15, 0.52, 0.07]
    )  # fmt: skip
    truth = PowerLaws(floor, scale, power)
    n_H = np.linspace(1e4, 2e6, 40)
    fitted = fit_power_laws(n_H, np.array([truth.loss(n) for n in n_H]))
    for n in (2e5, 2e6, 4e6):
        assert fitted.loss(n) == pytest.approx(truth.loss(n), rel=2e-3)
        assert fitted.slope(n) == pytest.approx(truth.slope(n), rel=0.05)


def test_the_fit_is_as_good_as_a_general_optimizer_and_passes_over_outliers() -> None:
    from scipy.optimize import minimize
    from scipy.special import huber

    rng = np.random.default_rng(4)
    truth = PowerLaws(np.array([1.5]), np.array([40.0]), np.array([0.35]))
    n_H = np.linspace(1e4, 1e6, 30)
    loss_H = np.array([truth.loss(n)[0] for n in n_H]) * np.exp(1e-3 * rng.normal(size=30))
    loss_H[[5, 21]] *= 1.2

    def cost(law: Any) -> float:
        curve = np.exp(law[0]) + np.exp(law[1] - law[2] * np.log(n_H))
        return float(huber(1e-3, np.log(curve / loss_H)).sum())

    starts = [(np.log(f), np.log(s), p) for f in (0.5, 1.5) for s in (10, 60) for p in (0.2, 0.5)]
    best = min(minimize(cost, start, method="Nelder-Mead").fun for start in starts)
    fitted = fit_power_laws(n_H, loss_H[:, None])
    ours = cost([np.log(fitted.floor_M[0]), np.log(fitted.scale_M[0]), fitted.power_M[0]])
    assert ours <= best * 1.02
    assert fitted.slope(1e6) == pytest.approx(truth.slope(1e6), rel=0.1)


def test_too_few_points_are_no_law() -> None:
    loss = np.full((4, 2), np.nan)
    loss[:, 0] = [3, 2.5, 2.2, 2.1]
    loss[:2, 1] = [3, 2]
    fitted = fit_power_laws(np.arange(1.0, 5.0), loss)
    assert np.isfinite(fitted.slope(4.0)).tolist() == [True, False]


def test_ado_prefers_what_still_learns() -> None:
    laws = PowerLaws(np.array([1.0, 1.0, 1.0]), np.array([9.0, 9, 9]), np.array([0.1, 0.3, 0.6]))
    mixer = adaptive("ado", context(3), **RAW, initial="uniform", fit_every=2)
    share = mixer.initial
    for k in range(12):
        middle = 300 * k + 150.0
        share = mixer.update(window(3, step=10 * k, loss=laws.loss(middle)))
        assert (share.tolist() == [1 / 3] * 3) == (k < 3)  # no law from fewer than four points
    # Updates 4 to 12 have a law; even shares, so preferences go by slope alone.
    slope = laws.slope(3600.0)
    assert share == pytest.approx(_ado_by_hand(laws), rel=0.02)
    assert np.argsort(share).tolist() == np.argsort(slope).tolist()


def _ado_by_hand(laws: PowerLaws) -> np.ndarray:
    mean = np.full(3, 1 / 3)
    share = mean
    for update, k in enumerate(range(3, 12), start=1):
        rho = laws.slope(300.0 * (k + 1))
        rho = np.maximum(rho / rho.sum(), 0.01)
        rho /= rho.sum()
        share = 0.9 * mean + 0.1 * rho
        mean = mean * (1 - 1 / (update + 1)) + rho / (update + 1)
    return share


def test_ado_thins_its_points_and_continues_exactly() -> None:
    rng = np.random.default_rng(1)
    mixer = adaptive("ado", context(3), fit_every=5)
    for k in range(130):
        loss = 2 + 3 / (k + 1) ** np.array([0.2, 0.4, 0.6]) + 0.01 * rng.random(3)
        mixer.update(window(3, step=10 * k, loss=loss))
    state = mixer.state_dict()["rule"]
    assert len(state["points"]) <= 48
    assert state["points"][0][0] < 10_000 < 30_000 < state["points"][-1][0]
    again = continued(mixer, adaptive("ado", context(3), fit_every=5))
    for k in range(130, 145):
        stats = window(3, step=10 * k, loss=2 + rng.random(3))
        assert again.update(stats).tolist() == mixer.update(stats).tolist()


# -- Aioli-style -----------------------------------------------------------------------------


def test_aioli_finds_the_domain_whose_share_makes_the_loss_fall() -> None:
    mixer = adaptive("aioli", context(4), **RAW, blocks=4, eta=1.0)
    share, losses, before = mixer.initial, np.full(4, 9.0), mixer.initial
    sampled = []
    for k in range(40):
        now, before = before, share  # shares hold two windows after the statistics
        stats = window(4, step=10 * k, tokens=np.round(1e5 * now).astype(int), loss=losses)
        share = mixer.update(stats)
        sampled.append(share)
        losses = losses - 0.01 * np.array([1.0, 1.0, 6.0, 1.0]) @ now
    assert np.mean(sampled[-8:], axis=0).argmax() == 2
    turns = [int(np.argmax(share - np.mean(sampled[-8:], axis=0))) for share in sampled[-8:]]
    assert sorted(set(turns)) == [0, 1, 2, 3]


def test_aioli_watches_the_targets_losses_if_there_are_targets() -> None:
    mixer = adaptive("aioli", context(3), targets="d2", loss="valid")
    assert mixer.needs == {"valid_loss", "tokens"}
    for k in range(5):
        share = mixer.update(window(3, step=10 * k, valid=[np.nan, np.nan, 5.0 - k]))
    assert mixer.warnings == 0
    assert share[2] == 0
