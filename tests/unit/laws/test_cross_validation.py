"""How laws are judged: scores against scipy and by hand, folds of whole runs, words of trust."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from raymix.laws import Score, mean_score, scores
from raymix.laws.cross_validation import FOLDS, early_rows, folds, out_of_fold, score, verdict
from raymix.laws.models.fitted_law import cross_validate, make_training_table, null_scores
from raymix.laws.models.regression import RidgeSolver
from raymix.laws.table import Floats, MixtureTable
from tests.support.tables import STEPS, AdditiveTruth, BiMixTruth, as_table, draw_shares

GOOD = Score(spearman=0.99, r2=0.97, mre=0.01)
NULLS = {"mean": Score(spearman=np.nan, r2=-0.1, mre=0.1)}


def of_runs(names: list[str], step: list[float] | None = None) -> MixtureTable:
    """Return a table of rows of which only the runs, and the steps, matter."""
    count = len(names)
    return MixtureTable(
        domains=("a", "b"),
        targets=("a",),
        runs=tuple(names),
        share_RD=np.full((count, 2), 0.5),
        loss_RV=np.linspace(2, 3, count)[:, None],
        step_R=None if step is None else np.array(step),
    )


losses = st.lists(st.integers(1, 9).map(float), min_size=3, max_size=20)


@settings(max_examples=15)
@given(measured=losses, seed=st.integers(0, 99))
def test_rank_correlation_is_that_of_scipy_with_ties(measured: list[float], seed: int) -> None:
    given_R = np.array(measured)
    guess_R = np.random.default_rng(seed).integers(1, 5, given_R.size).astype(float)
    actual = score(guess_R, given_R).spearman
    if np.ptp(given_R) == 0 or np.ptp(guess_R) == 0:
        assert np.isnan(actual)
    else:
        assert actual == pytest.approx(spearmanr(guess_R, given_R).statistic, abs=1e-12)


def test_scores_by_hand() -> None:
    # Deviations of the measured from their mean of 3: -1, 0, 1; errors: 1, 0, -1/2.
    actual = score(np.array([3.0, 3.0, 3.5]), np.array([2.0, 3.0, 4.0]))
    assert actual.r2 == pytest.approx(1 - 1.25 / 2)
    assert actual.mre == pytest.approx((1 / 2 + 0 + 1 / 8) / 3)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert actual.spearman == pytest.approx(1.5 / np.sqrt(1.5 * 2))


@settings(max_examples=15)
@given(measured=losses, factor=st.floats(0.1, 10))
def test_a_score_does_not_depend_on_the_unit_of_the_loss(
    measured: list[float], factor: float
) -> None:
    given_R = np.array(measured)
    guess_R = given_R[::-1] + 0.25
    first, second = score(guess_R, given_R), score(factor * guess_R, factor * given_R)
    for name in ("spearman", "r2", "mre"):
        np.testing.assert_allclose(getattr(second, name), getattr(first, name), atol=1e-9)


def test_exact_predictions_have_the_best_score_there_is() -> None:
    given_R = np.array([2.0, 5.0, 3.0, 4.0])
    assert score(given_R, given_R) == Score(spearman=pytest.approx(1), r2=1.0, mre=0.0)
    assert score(10 - given_R, given_R).spearman == pytest.approx(-1)


def test_a_constant_has_no_rank_correlation_but_an_error() -> None:
    actual = score(np.full(4, 3.0), np.array([2.0, 3.0, 3.0, 4.0]))
    assert np.isnan(actual.spearman)
    assert actual.r2 == pytest.approx(0)
    assert actual.mre == pytest.approx((1 / 2 + 1 / 4) / 4)
    flat = score(np.array([2.0, 3.0, 4.0]), np.full(3, 3.0))
    assert np.isnan(flat.spearman)
    assert np.isnan(flat.r2)


def test_rows_that_are_not_known_do_not_count() -> None:
    measured = np.array([2.0, np.nan, 3.0, 4.0, 5.0])
    guess = np.array([2.5, 9.0, 3.0, np.nan, 4.5])
    known = np.array([0, 2, 4])
    assert score(guess, measured) == score(guess[known], measured[known])
    two = score(guess[:3], measured[:3])
    assert np.isnan([two.spearman, two.r2, two.mre]).all()
    assert two.document() == {"spearman": None, "r2": None, "mre": None}


def test_scores_are_by_target_and_their_mean_over_targets() -> None:
    table = AdditiveTruth(3).table(8)
    off_V = np.array([0.01, 0.02, 0.06])
    actual = scores(table, table.loss_RV * (1 + off_V))
    assert list(actual) == list(table.targets)
    np.testing.assert_allclose([s.mre for s in actual.values()], off_V)
    assert mean_score(actual).mre == pytest.approx(0.03)
    assert mean_score(actual).spearman == pytest.approx(1)
    assert np.isnan(mean_score({}).mre)


@settings(max_examples=15)
@given(runs=st.integers(1, 30), rows=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_run_is_left_out_whole_and_once(runs: int, rows: int, seed: int) -> None:
    names = [f"r{at}" for at in range(runs) for _ in range(rows)]
    order = np.random.default_rng(seed).permutation(len(names))
    table = of_runs([names[at] for at in order])
    use_FR = folds(table, seed=seed)
    assert use_FR.shape == (runs if runs <= 2 * FOLDS else FOLDS, len(table))
    np.testing.assert_array_equal((~use_FR).sum(axis=0), 1)
    for use_R in use_FR:
        out = {table.runs[row] for row in np.flatnonzero(~use_R)}
        assert out.isdisjoint(table.runs[row] for row in np.flatnonzero(use_R))
        assert len(out) in (runs // len(use_FR), -(-runs // len(use_FR)))
    np.testing.assert_array_equal(use_FR, folds(table, seed=seed))


def test_folds_are_of_names_not_of_places() -> None:
    names = [f"r{at}" for at in range(17)]
    straight, turned = folds(of_runs(names)), folds(of_runs(names[::-1]))
    np.testing.assert_array_equal(straight, turned[:, ::-1])
    assert (folds(of_runs(names), seed=1) != straight).any()


def test_early_rows_are_in_the_first_part_of_the_range_of_steps() -> None:
    table = of_runs(["x"] * 5 + ["y"] * 5, [100, 200, 300, 400, 500] * 2)
    early_R = early_rows(table)
    assert early_R is not None
    assert early_R.tolist() == [True, True, True, False, False] * 2


@pytest.mark.parametrize("step", [None, [5, 5, 5], [1, 900, 1000], [700, 700, 800]])
def test_where_steps_are_too_few_nothing_is_asked_ahead(step: list[float] | None) -> None:
    """One early step, or none that is later: a slope in steps cannot be tested."""
    assert early_rows(of_runs(["x", "y", "z"], step)) is None


def test_what_is_left_out_is_what_the_fold_without_it_says() -> None:
    use_FR = np.array([[False, True, True], [True, False, True], [True, True, False]])
    predicted_FRV = np.arange(18.0).reshape(3, 3, 2)
    expected = [[0, 1], [8, 9], [16, 17]]
    np.testing.assert_array_equal(out_of_fold(use_FR, predicted_FRV), expected)


def says(
    runs: int, actual: Score, *, ahead: Score | None = None, notes: tuple[str, ...] = ()
) -> str:
    table = of_runs([f"r{at}" for at in range(runs)])
    later = {} if ahead is None else {"a": ahead}
    return verdict(table, {"a": actual}, later, NULLS, notes)


@pytest.mark.parametrize(
    ("runs", "actual", "message"),
    [
        (3, GOOD, "3 runs are too few for 2 domains: rank only (1 % off on runs left out)."),
        (4, GOOD, "Ranks and losses can be trusted (1 % off on runs left out)."),
        (
            4,
            Score(spearman=0.9, r2=0.97, mre=0.01),
            "Ranks can be trusted, differences below 2 % cannot.",
        ),
        (
            4,
            Score(spearman=0.99, r2=0.5, mre=0.013),
            "Ranks can be trusted, differences below 2.6 % cannot.",
        ),
        (
            4,
            Score(spearman=0.5, r2=0.1, mre=0.05),
            "Weak: rank correlation 0.50 on runs left out (5 % off on runs left out).",
        ),
        (
            4,
            Score(spearman=0.5, r2=0.1, mre=0.095),
            "Weak: rank correlation 0.50 on runs left out (9.5 % off on runs left out). "
            "No better than a model that ignores the mixture: choose nothing by it.",
        ),
    ],
)
def test_the_verdict_says_what_the_scores_allow(runs: int, actual: Score, message: str) -> None:
    assert says(runs, actual) == message


def test_the_verdict_adds_later_steps_and_notes() -> None:
    message = says(9, GOOD, ahead=Score(spearman=1, r2=1, mre=0.034), notes=("Mind the gap",))
    assert message.endswith(". Later steps from earlier ones: 3.4 % off. Mind the gap.")


def test_the_verdict_of_what_is_unknown_is_not_trust() -> None:
    nothing = Score(spearman=np.nan, r2=np.nan, mre=np.nan)
    assert says(9, nothing).startswith("Weak")
    assert "choose nothing by it" in says(9, nothing)


def test_a_null_model_of_steps_counts_too() -> None:
    table = of_runs([f"r{at}" for at in range(9)])
    blind = {**NULLS, "steps": Score(spearman=0.9, r2=0.9, mre=0.01)}
    assert "choose nothing by it" in verdict(table, {"a": GOOD}, {}, blind)
    own = {**NULLS, "own": Score(spearman=0.9, r2=0.9, mre=0.001)}
    assert "choose nothing by it" not in verdict(table, {"a": GOOD}, {}, own)


def test_null_models_know_what_they_know() -> None:
    """Losses of the own share alone: `own` is exact; of steps alone: `steps` is."""
    table = BiMixTruth(3).table(12)
    nulls = null_scores(make_training_table(table))
    assert nulls["own"].mre < 1e-6 < nulls["steps"].mre < nulls["mean"].mre
    share = np.repeat(draw_shares(12, 3), len(STEPS), axis=0)
    step = np.tile(STEPS, 12)
    loss = np.repeat((2 + 30 * step**-0.4)[:, None], 3, axis=1)
    nulls = null_scores(make_training_table(as_table(share, loss, step)))
    assert nulls["steps"].mre < 1e-5


def test_the_mean_is_that_of_the_other_folds() -> None:
    table = AdditiveTruth(3).table(4)
    expected = (table.loss_RV.sum(axis=0) - table.loss_RV) / 3
    actual = null_scores(make_training_table(table))["mean"]
    assert actual.mre == pytest.approx(np.mean(np.abs(expected - table.loss_RV) / table.loss_RV))


class Oracle(RidgeSolver):
    """Knows the losses of the rows it may learn from, and says 1 of the others."""

    def held_out(self, data: object, use_FR: np.ndarray) -> Floats:
        return np.where(use_FR[:, :, None], self.loss_RV, 1.0)

    def __init__(self, loss_RV: Floats) -> None:
        super().__init__()
        self.loss_RV = loss_RV


def test_no_row_is_judged_by_a_fold_that_has_seen_it() -> None:
    table = BiMixTruth(3).table(12, noise=0.01)
    apart, ahead = cross_validate(Oracle(table.loss_RV), make_training_table(table))
    late_R = ~early_rows(table)
    for at, target in enumerate(table.targets):
        off_R = np.abs(1 - table.loss_RV[:, at]) / table.loss_RV[:, at]
        assert apart[target].mre == pytest.approx(off_R.mean())
        assert ahead[target].mre == pytest.approx(off_R[late_R].mean())
        assert np.isnan(apart[target].spearman)


def test_losses_known_only_late_are_not_asked_about_ahead() -> None:
    table = BiMixTruth(3).table(12, noise=0.01)
    table.loss_RV[table.step_R < STEPS[-1], 1] = np.nan
    apart, ahead = cross_validate(Oracle(table.loss_RV), make_training_table(table))
    assert set(apart) == set(table.targets)
    assert set(ahead) == {"d0", "d2"}
    assert np.isfinite(apart["d1"].mre)
