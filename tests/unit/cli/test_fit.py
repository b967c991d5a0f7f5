"""`raymix fit`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.laws import load_law
from tests.support.tables import AdditiveTruth


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    truth = AdditiveTruth(3)
    truth.table(24, noise=0.002).write(folder / "train.csv")
    truth.table(12, seed=9).write(folder / "test.csv")
    truth.table(1).write(folder / "one.csv")
    return folder


def fit(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["fit", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_law_is_fitted_judged_and_written(tables: Path) -> None:
    law = tables / "law.json"
    options = ("--law", "additive", "--target", "d0,d2", "--out", str(law))
    holdout = ("--holdout", str(tables / "test.csv"))
    code, out, _ = fit(str(tables / "train.csv"), *options, *holdout)
    assert code == 0
    assert "law additive, from 24 rows of 24 runs" in out
    assert f"judged on {tables / 'test.csv'}" in out.replace("\n", "")
    assert load_law(law).targets == ("d0", "d2")


def test_json_has_the_keys_others_rely_on(tables: Path) -> None:
    code, out, _ = fit(str(tables / "train.csv"), "--law", "additive", "--json")
    document = json.loads(out)
    assert code == 0
    assert {"law", "cpu_s", "targets", "mean", "verdict"} <= set(document)
    assert set(document["targets"]["d0"]) == {"spearman", "r2", "mre"} == set(document["mean"])
    holdout = ("--holdout", str(tables / "test.csv"))
    _, out, _ = fit(str(tables / "train.csv"), "--law", "additive", *holdout, "--json")
    assert json.loads(out)["mean"] != document["mean"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{}/one.csv",), "too few runs for a law"),
        (("{}/none.csv",), "cannot be read"),
        (("{}/train.csv", "--law", "bimx"), "Did you mean 'bimix'?"),
        (("{}/train.csv", "--target", "d7"), "target = 'd7': not a loss of the table"),
        (("{}/train.csv", "--where", "size"), "not of the form COLUMN=VALUE"),
        (("{}/train.csv", "--where", "run=zz"), "where = 'zz': no row"),
    ],
)
def test_bad_input_is_one_error(tables: Path, arguments: tuple[str, ...], said: str) -> None:
    out = tables / "never.json"
    code, _, errors = fit(*(a.format(tables) for a in arguments), "--out", str(out))
    assert code == 2
    assert said in errors.replace("\n", " ")
    assert "Traceback" not in errors
    assert not out.exists()
