"""`raymix optimize`: from a law's file to shares, in this process, with a law of known numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymix.cli.optimize import rounded
from raymix.laws import Objective, law_to_dict, minimize
from tests.support.law_forms import Inverse, inverse
from tests.unit.cli.test_cli import call


@pytest.fixture
def law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inverse:
    monkeypatch.chdir(tmp_path)
    made = inverse(3, 4)
    Path("law.json").write_text(json.dumps(law_to_dict(made)))
    return made


def document_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert call("optimize", "law.json", *args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_every_option_reaches_the_objective(
    law: Inverse, capsys: pytest.CaptureFixture[str]
) -> None:
    given = document_of(
        capsys,
        *("--horizon", "500", "--weight", "t0=2", "--weight", "t2=1", "--cap", "d0=0.3"),
        *("--floor", "d1=0.05", "--max-epochs", "4", "--total-tokens", "1e9", "--available"),
        *("d2=1e7", "--kl", "0.02", "--prior", "d0=0.4,d1=0.3,d2=0.2,d3=0.1", "--minimax"),
    )
    prior = {"d0": 0.4, "d1": 0.3, "d2": 0.2, "d3": 0.1}
    expected = minimize(
        law,
        Objective(
            horizon=500,
            weights={"t0": 2, "t2": 1},
            caps={"d0": 0.3},
            floors={"d1": 0.05},
            max_epochs=4,
            total_tokens=1e9,
            available_tokens={"d2": 1e7},
            kl=0.02,
            prior=prior,
            minimax=True,
        ),
    )
    assert given["shares"] == expected.shares
    assert given["shares"]["d2"] <= 0.04
    assert given["losses"] == expected.losses
    assert given["gap"] == expected.gap
    assert given["reference"]["name"] == "prior"
    assert given["reference"]["shares"] == prior


def test_people_see_shares_losses_proof_and_a_section(
    law: Inverse, capsys: pytest.CaptureFixture[str]
) -> None:
    law.most = 0.25
    Path("law.json").write_text(json.dumps(law_to_dict(law)))
    given = document_of(capsys)
    assert call("optimize", "law.json", "--out", "best.yaml") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("domain   share  uniform  largest in a run\n")
    assert "method      convex: value" in shown
    assert "no allowed shares are better by over" in shown
    assert "warning     shares beyond what any run had: d" in shown
    section = yaml.safe_load(shown[shown.index("mixer:\n") :])
    assert section == yaml.safe_load(Path("best.yaml").read_text()) == {"mixer": given["mixer"]}
    assert sum(given["mixer"]["weights"].values()) == pytest.approx(1, abs=1e-12)
    assert given["mixer"]["weights"] == pytest.approx(given["shares"], abs=3e-6)


def test_the_section_is_one_that_recipes_take(
    law: Inverse, capsys: pytest.CaptureFixture[str]
) -> None:
    from raymix.recipe import StaticMixer

    given = document_of(capsys, "--out", "best.json")
    assert StaticMixer(**given["mixer"]).weights == given["mixer"]["weights"]
    assert json.loads(Path("best.json").read_text()) == {"mixer": given["mixer"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cap", "d0"], "--cap = 'd0': not NAME=NUMBER. Write e.g. --cap web=0.3."),
        (
            ["--cap", "d0=1", "--cap", "d0=1"],
            "--cap = 'd0=1': 'd0' was given before. Give it once.",
        ),
        (["--prior", "d0=x"], "--prior = 'd0=x': not NAME=NUMBER. Write e.g. --prior web=0.3."),
        (
            ["--floor", "dd0=0.1"],
            "objective.floors.dd0 = 0.1: the law knows no such domain. Did you mean 'd0'? "
            "Known: d0, d1, d2, d3.",
        ),
        (
            ["--kl", "0.1"],
            "objective.kl = 0.1: there is no prior to stay near to. Give a prior.",
        ),
    ],
)
def test_input_that_cannot_be_is_refused(
    law: Inverse, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert call("optimize", "law.json", *args, "--out", "best.yaml") == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("best.yaml").exists()


def test_a_file_that_is_no_law_is_refused(law: Inverse, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.json").write_text("shares")
    Path("empty.json").write_text("{}")
    for name in ("absent.json", "text.json", "empty.json"):
        assert call("optimize", name) == 2
        assert capsys.readouterr().err.startswith("error: law = ")


def test_rounded_shares_sum_to_one() -> None:
    assert rounded({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {
        "a": 0.333334,
        "b": 0.333333,
        "c": 0.333333,
    }
    many = rounded({f"d{at}": 1 / 7000 for at in range(7000)})
    assert sum(many.values()) == pytest.approx(1, abs=1e-9)
    assert min(many.values()) > 0
