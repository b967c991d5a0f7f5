"""The process, too, says the same in other units and orders; its folds are those of fresh fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from raymix.laws import MixtureTable, fit_law
from raymix.laws.table import Floats
from tests.support.tables import BiMixTruth, draw_shares

NEW = draw_shares(5, 3, seed=4)
STEP = np.full(5, 9000.0)


@pytest.fixture(scope="module")
def table() -> MixtureTable:
    return BiMixTruth(3).table(12, noise=0.01).with_targets(["d0", "d2"])


@pytest.fixture(scope="module")
def predicted(table: MixtureTable) -> Floats:
    return fit_law(table, law="gp")[0].predict(NEW, STEP)


def test_the_unit_of_steps_is_anyones(table: MixtureTable, predicted: Floats) -> None:
    assert table.step_R is not None
    longer, _ = fit_law(replace(table, step_R=1000 * table.step_R), law="gp")
    np.testing.assert_allclose(longer.predict(NEW, 1000 * STEP), predicted, rtol=1e-5)


def test_the_order_of_rows_says_nothing(table: MixtureTable, predicted: Floats) -> None:
    order = np.random.default_rng(0).permutation(len(table))
    turned, _ = fit_law(table.rows(order), law="gp")
    # The likelihood is followed for a few steps only, which rounding moves.
    np.testing.assert_allclose(turned.predict(NEW, STEP), predicted, rtol=1e-5)


def test_the_order_of_domains_says_nothing(table: MixtureTable, predicted: Floats) -> None:
    turn = [2, 0, 1]
    moved = replace(
        table,
        domains=tuple(table.domains[i] for i in turn),
        share_RD=table.share_RD[:, turn],
    )
    law, _ = fit_law(moved, law="gp")
    np.testing.assert_allclose(law.predict(NEW[:, turn], STEP), predicted, rtol=1e-5)


def test_a_target_does_not_depend_on_the_others(table: MixtureTable, predicted: Floats) -> None:
    alone, _ = fit_law(table, law="gp", targets=["d2"])
    np.testing.assert_allclose(alone.predict(NEW, STEP)[:, 0], predicted[:, 1], rtol=1e-6)


def test_losses_known_late_only_do_not_keep_any_law_from_being_chosen(table: MixtureTable) -> None:
    late = table.rows(np.ones(len(table), bool))
    late = replace(late, loss_RV=late.loss_RV.copy())
    assert late.step_R is not None
    late.loss_RV[late.step_R < late.step_R.max(), 1] = np.nan
    _, report = fit_law(late)
    assert set(report.candidates) == {
        "bimix", "exponential", "additive", "joint", "regression", "gp",
    }  # fmt: skip
    assert all(np.isfinite(score.mre) for score in report.candidates.values())
    assert set(report.ahead) == {"d0"}
