"""Mixing laws: planted ones are found again, derivatives are right, and trust is said as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raymix.errors import LawError
from raymix.laws import (
    FittedLaw,
    build_law,
    fit_law,
    known_laws,
    law_from_dict,
    load_law,
    mean_score,
    save_law,
    scores,
)
from raymix.laws.models.curves import AdditiveCurve, BiMixCurve, ExponentialCurve
from raymix.laws.models.gaussian_process import ProcessRows, hyper_prior, negative_log_posterior
from raymix.laws.models.least_squares import Inputs
from tests.support.tables import AdditiveTruth, BiMixTruth, as_table, draw_shares

STEPPED = ("bimix", "exponential", "additive", "joint", "gp", "regression")


def theta_of(law: FittedLaw) -> dict[str, np.ndarray]:
    state = law.state_dict()["solver"]
    columns = np.exp(np.array(state["theta"])).T
    return {name.removeprefix("log_"): c for name, c in zip(state["names"], columns, strict=True)}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.01, 0.15)])
def test_bimix_finds_planted_coefficients(noise: float, tolerance: float) -> None:
    truth = BiMixTruth(6)
    table = truth.table(24, noise=noise)
    law, report = fit_law(table, law="bimix")
    assert isinstance(law, FittedLaw)
    unit = law.state_dict()["unit"]
    actual = theta_of(law)
    np.testing.assert_allclose(
        actual["alpha"], truth.alpha, rtol=tolerance, atol=0.02 * noise * 100
    )
    np.testing.assert_allclose(actual["C"], truth.C, rtol=2 * tolerance)
    late = np.array([40_000.0])
    share = np.full((1, 6), 1 / 6)
    np.testing.assert_allclose(
        law.predict(share, late), truth(share, late), rtol=1e-4 if not noise else 0.02
    )
    if not noise:
        np.testing.assert_allclose(actual["b"], truth.b, rtol=tolerance)
        np.testing.assert_allclose(actual["B"] * unit**truth.b, truth.B, rtol=5 * tolerance)
        assert report.mean.mre < 1e-4


def test_bimix_has_no_redundant_coefficient() -> None:
    """A of the paper is a scale of B and C: losses scaled by k are found with B and C times k."""
    truth = BiMixTruth(3)
    table = truth.table(12)
    scaled = as_table(table.share_RD, 2.5 * table.loss_RV, table.step_R)
    laws = [fit_law(given, law="bimix")[0] for given in (table, scaled)]
    first, second = (theta_of(law) for law in laws if isinstance(law, FittedLaw))
    assert set(first) == {"alpha", "B", "C", "b"}
    np.testing.assert_allclose(second["C"], 2.5 * first["C"], rtol=1e-3)
    np.testing.assert_allclose(second["B"], 2.5 * first["B"], rtol=1e-3)
    np.testing.assert_allclose(second["alpha"], first["alpha"], rtol=1e-3)


def test_absent_domains_have_a_finite_loss() -> None:
    truth = BiMixTruth(4, eps=0.01)
    table = truth.table(24, zeros=0.3)
    law = build_law("bimix", eps=0.01)
    law.fit(table)
    np.testing.assert_allclose(law.predict(table.share_RD, table.step_R), table.loss_RV, rtol=1e-3)
    guessed, _ = fit_law(table, law="bimix")
    assert np.isfinite(guessed.predict(np.eye(4), np.full(4, 9000.0))).all()


@pytest.mark.parametrize("kind", ["additive", "gp", "auto"])
def test_laws_with_cross_terms_predict_what_own_shares_cannot(kind: str) -> None:
    truth = AdditiveTruth(5)
    pair = ["d0", "d3"]
    law, report = fit_law(truth.table(60, noise=0.002), law=kind, targets=pair)
    test = truth.table(40, seed=9).with_targets(pair)
    actual = mean_score(scores(test, law.predict(test.share_RD)))
    assert actual.spearman > 0.98
    assert actual.mre < 0.01
    assert report.nulls["own"].mre > 3 * report.mean.mre
    assert report.mean.mre < 0.015


def test_auto_takes_the_law_that_made_the_table() -> None:
    table = BiMixTruth(4).table(12, noise=0.001).with_targets(["d1"])
    law, report = fit_law(table, law="auto")
    best = min(report.candidates, key=lambda kind: report.candidates[kind].mre)
    assert report.law == law.kind == best == "bimix"
    assert "Chosen by cross-validation: bimix" in report.verdict


@pytest.mark.parametrize("kind", STEPPED)
def test_share_gradients_are_derivatives(kind: str) -> None:
    table = BiMixTruth(4).table(10, noise=0.01)
    law, _ = fit_law(table, law=kind, targets=["d0", "d2"])
    share, step = np.array([0.4, 0.3, 0.2, 0.1]), 5000.0
    loss, gradient = law.share_gradient(share, step)
    at = np.array([step])
    np.testing.assert_allclose(loss, law.predict(share[None], at)[0], rtol=1e-9)
    for domain in range(4):
        nudge = 1e-5 * np.eye(4)[domain]
        ends = [law.predict((share + sign * nudge)[None], at)[0] for sign in (1, -1)]
        # Predictions do not ask that shares sum to 1.
        np.testing.assert_allclose(gradient[:, domain], (ends[0] - ends[1]) / 2e-5, atol=2e-5)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("steps", [True, False])
def test_curves_have_the_jacobian_they_say(joint: bool, steps: bool) -> None:
    random = np.random.default_rng(0)
    own = np.array([0, 2])
    names = ("a", "b", "c")
    share = draw_shares(5, 3, zeros=0.2)
    inputs = Inputs(share, random.normal(size=5) * steps)
    curves = [
        AdditiveCurve(names, own, steps, joint),
        BiMixCurve(own, 0.01, steps),
        ExponentialCurve(names, steps),
    ]
    for curve in curves:
        theta = 0.3 * random.normal(size=(4, len(curve.names)))
        value, jacobian = curve.evaluate(theta, inputs)
        assert value.shape == (4, 5)
        for at in range(theta.shape[1]):
            nudge = 1e-6 * np.eye(theta.shape[1])[at]
            ends = [curve.evaluate(theta + sign * nudge, inputs)[0] for sign in (1, -1)]
            np.testing.assert_allclose(jacobian[:, :, at], (ends[0] - ends[1]) / 2e-6, atol=1e-7)


def test_the_evidence_has_the_gradient_it_says() -> None:
    random = np.random.default_rng(0)
    share = draw_shares(20, 3)
    rows = ProcessRows(
        np.sqrt(share),
        random.normal(size=20),
        random.normal(size=20),
        random.normal(size=20),
        0.3 * random.normal(size=(20, 4)),
        random.uniform(0.5, 1, 20),
    )
    trend = rows.scaled_jac_NP @ rows.scaled_jac_NP.T
    mean, spread = hyper_prior(3, 0.1)
    at = mean + 0.3 * random.normal(size=len(mean))
    _, gradient = negative_log_posterior(at, rows, trend, mean, spread)
    for number in range(len(at)):
        nudge = 1e-5 * np.eye(len(at))[number]
        up, down = (
            negative_log_posterior(at + s * nudge, rows, trend, mean, spread)[0] for s in (1, -1)
        )
        assert gradient[number] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", STEPPED)
def test_a_law_survives_its_file(tmp_path: Path, kind: str) -> None:
    table = BiMixTruth(3).table(8, noise=0.01)
    law, report = fit_law(table, law=kind, targets=["d1", "d2"])
    save_law(tmp_path / "law.json", law, report)
    again = load_law(tmp_path / "law.json")
    assert (again.kind, again.domains, again.targets) == (law.kind, law.domains, law.targets)
    share, step = draw_shares(6, 3, seed=4), np.full(6, 6000.0)
    np.testing.assert_allclose(again.predict(share, step), law.predict(share, step), rtol=1e-8)
    np.testing.assert_allclose(again.deviation(share, step), law.deviation(share, step), rtol=1e-3)
    document = json.loads((tmp_path / "law.json").read_text("utf-8"))
    assert document["report"]["law"] == law.kind
    assert document["report"]["mean"]["mre"] == pytest.approx(report.mean.mre)


def test_the_deviation_is_the_size_of_the_error() -> None:
    """Predictions at new mixtures miss by about the standard deviation that goes with them."""
    truth = AdditiveTruth(4)
    law, _ = fit_law(truth.table(40, noise=0.01), law="gp", targets=["d0", "d1"])
    test = truth.table(200, seed=8).with_targets(["d0", "d1"])
    ratio = (law.predict(test.share_RD) - test.loss_RV) / law.deviation(test.share_RD)
    assert 0.3 < np.sqrt(np.mean(ratio**2)) < 2.0


def test_intervals_hold_what_was_planted() -> None:
    truth = BiMixTruth(6)
    _, report = fit_law(truth.table(30, noise=0.005), law="bimix")
    fixed = [
        low <= true <= high
        for true, target in zip(truth.alpha, report.coefficients, strict=True)
        for value, low, high in [report.coefficients[target]["alpha"]]
        if low <= value <= high
    ]
    assert sum(fixed) >= 4


def test_outliers_and_missing_losses_do_little_harm() -> None:
    truth = AdditiveTruth(4)
    table = truth.table(60, noise=0.002)
    table.loss_RV[3] *= 1.5
    table.loss_RV[10:20, 1] = np.nan
    law, _ = fit_law(table, law="additive")
    test = truth.table(30, seed=9)
    assert mean_score(scores(test, law.predict(test.share_RD))).mre < 0.01


def test_too_few_runs_are_said_to_be_too_few() -> None:
    _, report = fit_law(AdditiveTruth(9).table(12), law="additive")
    assert report.verdict.startswith("12 runs are too few for 9 domains: rank only")


def test_a_law_that_knows_nothing_says_so() -> None:
    share = draw_shares(30, 3)
    noise = np.random.default_rng(0).uniform(2, 4, (30, 3))
    _, report = fit_law(as_table(share, noise), law="additive")
    assert "choose nothing by it" in report.verdict


def test_later_steps_are_a_question_of_their_own() -> None:
    table = BiMixTruth(3).table(12, noise=0.001)
    _, report = fit_law(table, law="bimix")
    assert set(report.ahead) == set(table.targets)
    assert max(score.mre for score in report.ahead.values()) < 0.02
    assert {"mean", "own", "steps"} == set(report.nulls)
    _, without = fit_law(AdditiveTruth(3).table(12), law="additive")
    assert not without.ahead


def test_names_of_targets_find_their_domain_or_the_nearest() -> None:
    truth = BiMixTruth(3)
    table = truth.table(16)
    renamed = as_table(table.share_RD, table.loss_RV[:, :1], table.step_R)
    renamed = type(renamed)(
        domains=renamed.domains,
        targets=("elsewhere",),
        runs=renamed.runs,
        share_RD=renamed.share_RD,
        loss_RV=renamed.loss_RV,
        step_R=renamed.step_R,
    )
    law, report = fit_law(renamed, law="bimix")
    assert law.state_dict()["solver"]["own"] == [0]
    assert "No domain is called elsewhere" in report.verdict


def test_what_cannot_be_fitted_is_refused() -> None:
    table = AdditiveTruth(3).table(12)
    with pytest.raises(LawError, match="too few runs for a law"):
        fit_law(table.rows(np.array([0])))
    same = as_table(np.repeat(table.share_RD[:1], 5, axis=0), table.loss_RV[:5])
    same = type(same)(
        domains=same.domains,
        targets=same.targets,
        runs=tuple("abcde"),
        share_RD=same.share_RD,
        loss_RV=same.loss_RV,
    )
    with pytest.raises(LawError, match="all runs have the same shares"):
        fit_law(same)
    with pytest.raises(LawError, match="Did you mean 'bimix'"):
        build_law("bimx")
    with pytest.raises(LawError, match="target = 'zz': not a loss"):
        fit_law(table, targets=["zz"])
    law = build_law("additive")
    with pytest.raises(LawError, match="not fitted yet"):
        law.predict(np.full((1, 3), 1 / 3))
    law.fit(table)
    with pytest.raises(LawError, match="the table had no steps"):
        law.predict(np.full((1, 3), 1 / 3), np.array([5.0]))
    with pytest.raises(LawError, match="not 3 shares"):
        law.predict(np.full((1, 2), 1 / 2))


@pytest.mark.parametrize("document", [{}, {"format": 99}, {"format": 1, "law": "bimix"}, []])
def test_what_is_no_law_is_refused(tmp_path: Path, document: object) -> None:
    (tmp_path / "law.json").write_text(json.dumps(document))
    with pytest.raises(LawError):
        load_law(tmp_path / "law.json")
    if isinstance(document, dict):
        with pytest.raises(LawError):
            law_from_dict(document)


def test_all_kinds_are_known() -> None:
    kinds = {"bimix", "exponential", "additive", "joint", "gp", "regression", "lightgbm", "auto"}
    assert kinds <= set(known_laws())
