"""Laws as users hold them: units, orders, names, missing losses, ridge, the choice, the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from raymix._utils.threads import one_thread
from raymix.errors import LawError
from raymix.laws import (
    AutoLaw,
    FittedLaw,
    Law,
    MixtureTable,
    build_law,
    fit_law,
    law_from_dict,
    law_to_dict,
    load_law,
    save_law,
)
from raymix.laws.models.fitted_law import make_training_table, own_domains, share_offset
from raymix.laws.models.parametric import run_weights
from raymix.laws.models.regression import RidgeSolver
from raymix.laws.table import Floats
from tests.support.tables import STEPS, AdditiveTruth, BiMixTruth, as_table, draw_shares

STEPPED = ("bimix", "exponential", "additive", "joint", "regression")
NEW = draw_shares(5, 3, seed=4)


@pytest.fixture(scope="module")
def stepped() -> MixtureTable:
    """Return eight runs of three domains at four steps, two losses, 1 % of noise."""
    return BiMixTruth(3).table(8, noise=0.01).with_targets(["d0", "d2"])


@pytest.fixture(scope="module")
def laws(stepped: MixtureTable) -> dict[str, Law]:
    return {kind: learned(kind, stepped) for kind in STEPPED}


def learned(kind: str, table: MixtureTable) -> FittedLaw:
    """Return a law that has learned and was not judged, which takes most of the time of a fit."""
    law, data = build_law(kind), make_training_table(table)
    assert isinstance(law, FittedLaw)
    law.solver.learn(data)
    law.record_table(data)
    return law


def at(step: float) -> Floats:
    return np.full(len(NEW), step)


@pytest.mark.parametrize("kind", STEPPED)
def test_the_unit_of_steps_is_anyones(
    kind: str, stepped: MixtureTable, laws: dict[str, Law]
) -> None:
    assert stepped.step_R is not None
    longer = learned(kind, replace(stepped, step_R=1000 * stepped.step_R))
    first, second = laws[kind].predict(NEW, at(9000)), longer.predict(NEW, at(9e6))
    np.testing.assert_allclose(second, first, rtol=1e-6)


@pytest.mark.parametrize("kind", STEPPED)
def test_the_order_of_rows_says_nothing(
    kind: str, stepped: MixtureTable, laws: dict[str, Law]
) -> None:
    order = np.random.default_rng(0).permutation(len(stepped))
    turned = learned(kind, stepped.rows(order))
    np.testing.assert_allclose(
        turned.predict(NEW, at(9000)), laws[kind].predict(NEW, at(9000)), rtol=1e-5
    )


@pytest.mark.parametrize("kind", STEPPED)
def test_the_order_of_domains_and_targets_says_nothing(
    kind: str, stepped: MixtureTable, laws: dict[str, Law]
) -> None:
    turn = [2, 0, 1]
    moved = replace(
        stepped,
        domains=tuple(stepped.domains[i] for i in turn),
        targets=stepped.targets[::-1],
        share_RD=stepped.share_RD[:, turn],
        loss_RV=stepped.loss_RV[:, ::-1],
    )
    law = learned(kind, moved)
    before = laws[kind].predict(NEW, at(9000))
    np.testing.assert_allclose(law.predict(NEW[:, turn], at(9000))[:, ::-1], before, rtol=1e-5)
    _, slope = law.share_gradient(NEW[0][turn], 9000.0)
    _, slope_before = laws[kind].share_gradient(NEW[0], 9000.0)
    np.testing.assert_allclose(slope[::-1], slope_before[:, turn], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", STEPPED)
def test_a_target_does_not_depend_on_the_others(
    kind: str, stepped: MixtureTable, laws: dict[str, Law]
) -> None:
    alone = learned(kind, stepped.with_targets(["d2"]))
    actual = alone.predict(NEW, at(9000))[:, 0]
    np.testing.assert_allclose(actual, laws[kind].predict(NEW, at(9000))[:, 1], rtol=1e-7)


@pytest.mark.parametrize("kind", STEPPED)
def test_without_a_step_it_is_the_last_of_the_table(kind: str, laws: dict[str, Law]) -> None:
    law = laws[kind]
    np.testing.assert_array_equal(law.predict(NEW), law.predict(NEW, at(STEPS[-1])))
    np.testing.assert_array_equal(law.predict(NEW[0]), law.predict(NEW[:1]))
    assert (law.deviation(NEW) > 0).all()
    assert law.deviation(NEW).shape == law.predict(NEW).shape == (5, 2)


def test_longer_runs_come_to_lower_losses(laws: dict[str, Law]) -> None:
    for kind in ("bimix", "exponential", "additive", "joint"):
        late = [laws[kind].predict(NEW, at(step)) for step in (4000, 16_000, 64_000)]
        assert (late[0] > late[1]).all()
        assert (late[1] > late[2]).all()


@pytest.mark.parametrize("kind", ["bimix", "regression", "gp"])
def test_losses_known_at_the_last_step_only_are_learned_too(kind: str) -> None:
    """No fold is without them, but the early rows are: nothing is said of them ahead."""
    table = BiMixTruth(3).table(6, noise=0.01).with_targets(["d0", "d2"])
    assert table.step_R is not None
    table.loss_RV[table.step_R < STEPS[-1], 1] = np.nan
    law, report = fit_law(table, law=kind)
    assert np.isfinite(law.predict(NEW)).all()
    assert set(report.ahead) == {"d0"}
    assert np.isfinite(report.targets["d2"].mre)
    assert "nan" not in report.verdict


def test_a_target_of_fewer_than_three_runs_is_refused() -> None:
    """However many rows there are: nothing can be left out."""
    table = BiMixTruth(3).table(8)
    table.loss_RV[8:, 1] = np.nan
    with pytest.raises(LawError, match=r"table\.loss\.d1 .* measured in 2 runs, fewer than 3"):
        fit_law(table, law="bimix")


def test_missing_losses_differ_by_target_in_a_saved_process() -> None:
    """As many are missing of each, but not the same ones."""
    table = AdditiveTruth(3).table(16, noise=0.002).with_targets(["d0", "d1"])
    table.loss_RV[0, 0] = table.loss_RV[5, 1] = np.nan
    law = learned("gp", table)
    again = law_from_dict(json.loads(json.dumps(law_to_dict(law))))
    np.testing.assert_allclose(again.predict(NEW), law.predict(NEW), rtol=1e-7)
    # A small difference of large variances.
    np.testing.assert_allclose(again.deviation(NEW), law.deviation(NEW), rtol=1e-2)


@pytest.mark.parametrize("target", ["Stack-Exchange", "stack_exchange", "STACK EXCHANGE"])
def test_the_own_domain_is_found_by_name_however_it_is_spelt(target: str) -> None:
    table = AdditiveTruth(3).table(12).with_targets(["d0"])
    named = replace(table, domains=("web", "books", "stack-exchange"), targets=(target,))
    own_V, named_V = own_domains(named)
    assert (own_V.tolist(), named_V.tolist()) == ([2], [True])


@settings(max_examples=12)
@given(own=st.integers(0, 2), seed=st.integers(0, 50))
def test_without_a_name_it_is_the_one_that_goes_with_low_losses(own: int, seed: int) -> None:
    share = draw_shares(15, 3, seed=seed)
    table = replace(as_table(share, 4 - share[:, own : own + 1]), targets=("elsewhere",))
    own_V, named_V = own_domains(table)
    assert (own_V.tolist(), named_V.tolist()) == ([own], [False])


def test_a_law_that_is_fitted_again_forgets_what_was_said_before() -> None:
    table = BiMixTruth(3).table(6)
    law = build_law("bimix")
    nameless = law.fit(replace(table, targets=("x", "y", "z")))
    assert "No domain is called x, y, z" in nameless.verdict
    assert "No domain" not in law.fit(table).verdict


def test_a_fit_that_is_refused_leaves_the_law_as_it_was(stepped: MixtureTable) -> None:
    law = build_law("additive")
    law.fit(stepped)
    before = law.predict(NEW)
    with pytest.raises(LawError, match="too few runs"):
        law.fit(stepped.rows(np.arange(8)))
    np.testing.assert_array_equal(law.predict(NEW), before)


def test_a_law_knows_the_range_it_has_seen(stepped: MixtureTable, laws: dict[str, Law]) -> None:
    for law in laws.values():
        np.testing.assert_array_equal(law.max_share_D, stepped.share_RD.max(axis=0))


def test_what_is_added_to_shares_is_half_of_the_least() -> None:
    assert share_offset(np.array([[0.2, 0.8], [1.0, 0.0]])) == 0.1
    assert share_offset(np.array([[0.2, 0.8]])) == 0.0


def test_the_steps_of_training_are_relative_to_their_geometric_mean(stepped: MixtureTable) -> None:
    data = make_training_table(stepped)
    assert data.inputs.log_step_N.mean() == pytest.approx(0, abs=1e-12)
    assert data.unit == pytest.approx(np.sqrt(STEPS[1] * STEPS[2]))
    assert make_training_table(AdditiveTruth(3).table(5)).unit == 1.0


def test_rows_of_a_subset_are_those_seen_or_all_if_there_are_none() -> None:
    table = AdditiveTruth(3).table(5).with_targets(["d0", "d1"])
    table.loss_RV[:2, 1] = np.nan
    use_FR = np.array([[True, True, False, False, False], [True, False, True, True, True]])
    seen_FVR = make_training_table(table).seen_in(use_FR)
    np.testing.assert_array_equal(seen_FVR[:, 0], use_FR)
    np.testing.assert_array_equal(seen_FVR[0, 1], [False, False, True, True, True])
    np.testing.assert_array_equal(seen_FVR[1, 1], [False, False, True, True, True])


def log_linear(runs: int, noise: float = 0.0) -> tuple[MixtureTable, Any]:
    """Return a table of log loss = 1 + b . r + c log(r + eps), as ridge has it, and the law."""
    slope, power = np.array([0.3, -0.2, 0.1]), np.array([-0.1, 0.02, -0.05])
    share = draw_shares(runs, 3)
    # Half the least share, from a thousandth up.
    eps = max(1e-3, share.min() / 2)

    def law(share_RD: Floats) -> Floats:
        return np.exp(1 + share_RD @ slope + np.log(share_RD + eps) @ power)

    random = np.random.default_rng(1).normal(size=runs)
    return as_table(share, (law(share) * np.exp(noise * random))[:, None]), law


def test_ridge_finds_a_log_linear_law() -> None:
    table, law = log_linear(40)
    actual, report = fit_law(table, law="regression")
    np.testing.assert_allclose(actual.predict(NEW)[:, 0], law(NEW), rtol=1e-3)
    assert report.mean.mre < 1e-3
    assert not report.coefficients


def test_the_deviation_of_ridge_is_that_of_rows_left_out() -> None:
    """Of the closed form, against leaving each row out in turn at the penalty it found."""
    noise = 0.02
    table, _ = log_linear(60, noise)
    law, _ = fit_law(table, law="regression")
    relative = law.deviation(NEW) / law.predict(NEW)
    np.testing.assert_allclose(relative, relative[0, 0])
    assert relative[0, 0] == pytest.approx(noise, rel=0.35)
    solver, data = RidgeSolver(), make_training_table(table)
    solver.learn(data)
    left_FRV = solver.held_out(data, ~np.eye(60, dtype=bool))
    off_R = np.log(left_FRV[np.arange(60), np.arange(60), 0] / table.loss_RV[:, 0])
    assert np.sqrt(np.mean(off_R**2)) == pytest.approx(relative[0, 0], rel=0.1)


def test_a_ridge_of_pure_noise_shrinks_to_the_mean() -> None:
    """The penalty is chosen by rows left out, so features that tell nothing get no weight."""
    loss = np.exp(np.random.default_rng(5).normal(1, 0.1, (40, 1)))
    law, _ = fit_law(as_table(draw_shares(40, 3), loss), law="regression")
    assert np.std(np.log(law.predict(draw_shares(50, 3, seed=8)))) < 0.05


@pytest.mark.parametrize("kind", ["additive", "regression", "gp"])
def test_answers_of_subsets_have_the_shape_they_say(kind: str) -> None:
    table = AdditiveTruth(3).table(10, noise=0.01).with_targets(["d0", "d1"])
    law, data = learned(kind, table), make_training_table(table)
    use_FR = np.stack([np.arange(10) % 3 != fold for fold in range(3)])
    actual_FRV = law.solver.held_out(data, use_FR)
    assert actual_FRV.shape == (3, 10, 2)
    assert (actual_FRV > 0).all()
    assert (actual_FRV[0] != actual_FRV[1]).any()


def test_weights_of_draws_are_the_runs_own(stepped: MixtureTable) -> None:
    weight_KN = run_weights(stepped, 50)
    assert weight_KN.shape == (50, len(stepped))
    by_run = weight_KN.reshape(50, 8, 4)
    np.testing.assert_array_equal(by_run, by_run[:, :, :1] * np.ones(4))
    np.testing.assert_allclose(weight_KN.mean(axis=1), 1)
    np.testing.assert_array_equal(weight_KN, run_weights(stepped, 50))


def test_auto_tries_what_it_is_told_and_says_so(tmp_path: Path) -> None:
    table = AdditiveTruth(3).table(20, noise=0.002)
    law, report = fit_law(table, candidates=["bimix", "additive"])
    assert isinstance(law, AutoLaw)
    assert list(report.candidates) == ["bimix", "additive"]
    assert report.law == law.kind == "additive"
    assert report.verdict.endswith("Chosen by cross-validation: additive, of bimix, additive.")
    alone, alone_report = fit_law(table, law="additive")
    np.testing.assert_array_equal(law.predict(NEW), alone.predict(NEW))
    assert report.targets == alone_report.targets
    assert report.candidates["additive"] == alone_report.mean
    assert (law.domains, law.targets, law.convex) == (alone.domains, alone.targets, alone.convex)
    # In a file it is the law it became.
    save_law(tmp_path / "law.json", law, report)
    again = load_law(tmp_path / "law.json")
    assert again.kind == "additive"
    assert isinstance(again, FittedLaw)
    np.testing.assert_allclose(again.predict(NEW), law.predict(NEW), rtol=1e-12)


def test_auto_goes_on_without_candidates_that_fail() -> None:
    """Trees need fifty runs, and say so if nothing else can be fitted either."""
    table = AdditiveTruth(3).table(12, noise=0.002)
    law, report = fit_law(table, candidates=["lightgbm", "exponential"])
    assert law.kind == "exponential"
    assert list(report.candidates) == ["exponential"]
    with pytest.raises(LawError, match="no law can be fitted") as raised:
        fit_law(table, candidates=["lightgbm"])
    assert "lightgbm: table.runs = 12: too few runs for a law" in str(raised.value)


def test_candidates_that_are_none_are_a_mistake() -> None:
    table = AdditiveTruth(3).table(12, noise=0.002)
    with pytest.raises(LawError, match="Did you mean 'additive'"):
        fit_law(table, candidates=["additve", "bimix"])
    with pytest.raises(LawError, match="no law can be fitted to this table"):
        fit_law(table, candidates=["auto"])


def test_auto_before_a_fit_knows_nothing() -> None:
    law = build_law("auto")
    assert (law.kind, law.domains, law.targets) == ("auto", (), ())
    with pytest.raises(LawError, match="not fitted yet"):
        law.predict(NEW)
    with pytest.raises(LawError, match="not fitted yet"):
        law.state_dict()
    with pytest.raises(LawError, match="not the kind of a fitted law"):
        law.load_state_dict({})


def test_auto_counts_later_steps_as_much_as_other_runs(stepped: MixtureTable) -> None:
    """Losses of the own share and steps: laws that know both are better than one that does not."""
    law, report = fit_law(stepped, candidates=["bimix", "regression"], targets=["d0"])
    assert law.kind == "bimix"
    assert set(report.candidates) == {"bimix", "regression"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("additive", {"eps": 0.1}, "law.eps = 0.1: no option of the law 'additive'. It has none."),
        ("bimix", {"epz": 0.1}, "Options: eps. Did you mean 'eps'?"),
        ("auto", {"candidate": []}, "Did you mean 'candidates'?"),
    ],
)
def test_options_that_a_law_does_not_have_are_refused(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LawError) as raised:
        build_law(kind, **options)
    assert message in str(raised.value)


def test_fitting_from_a_file_is_fitting_its_table(tmp_path: Path, stepped: MixtureTable) -> None:
    stepped.write(tmp_path / "runs.csv")
    table, _ = fit_law(stepped, law="bimix", eps=0.02)
    file, _ = fit_law(tmp_path / "runs.csv", law="bimix", eps=0.02)
    np.testing.assert_allclose(file.predict(NEW), table.predict(NEW), rtol=1e-9)
    assert file.state_dict()["solver"]["eps"] == 0.02


def test_a_law_is_written_whole_or_not_at_all(tmp_path: Path, laws: dict[str, Law]) -> None:
    path = tmp_path / "law.json"
    save_law(path, laws["bimix"])
    before = path.read_bytes()
    with pytest.raises(LawError, match="not fitted yet"):
        save_law(path, build_law("bimix"))
    assert path.read_bytes() == before
    assert json.loads(before)["report"] is None
    assert [actual.name for actual in tmp_path.iterdir()] == ["law.json"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(LawError, match=r"absent\.json.*cannot be read"):
        load_law(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"format": 1, "law"')
    with pytest.raises(LawError, match=r"cut\.json.*cannot be read"):
        load_law(tmp_path / "cut.json")


@pytest.mark.parametrize("drop", ["domains", "targets", "unit", "last", "most", "solver"])
def test_a_state_that_lacks_a_part_is_refused(drop: str, laws: dict[str, Law]) -> None:
    document = law_to_dict(laws["bimix"])
    del document["state"][drop]
    with pytest.raises(LawError, match=f"not a law: KeyError '{drop}'"):
        law_from_dict(document)


def threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_threads_are_one_inside_and_what_they_were_outside() -> None:
    before = threads()
    with one_thread(), one_thread():
        assert set(threads()) <= {1}
    assert threads() == before
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert threads() == before
