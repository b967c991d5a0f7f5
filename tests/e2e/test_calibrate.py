"""`raymix schedule calibrate` on a tiny model: measured, fitted, kept, and taken by `simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymix.schedule import load_cost_model
from tests.support.recipes import document, write
from tests.unit.cli.test_cli import call

MODEL = {
    "kind": "config",
    "type": "llama",
    "config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def test_a_cost_model_is_measured_and_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = document(model=MODEL)
    recipe["corpus"]["tokenizer"] = {"kind": "byte"}
    recipe["corpus"]["path"] = str(tmp_path / "corpus")
    source = write(tmp_path / "recipe.yaml", recipe)
    out = tmp_path / "cost.json"
    few = ("--ranks", "2", "--longest", "256", "--seconds", "1", "--device", "cpu")
    assert call("schedule", "calibrate", str(source), "--out", str(out), *few, "--json") == 0
    result = json.loads(capfd.readouterr().out)
    kinds = {item["kind"] for item in result["measurements"]}
    assert kinds == {"attention", "linear", "gather", "memory"}
    cost = load_cost_model(out)
    assert json.loads(json.dumps(cost.document())) == result["cost"]
    assert [link.width for link in cost.links] == [2]
    assert "CPU" in cost.hardware
    assert "torch" in cost.hardware
    again = ("--cost", str(out), "--groups", "1", "--context", "2", "--batch", "6", "--steps", "1")
    assert call("schedule", "simulate", "llama3", *again, "--planners", "packed", "--json") == 0
    simulated = json.loads(capfd.readouterr().out)
    assert simulated["cost"] == result["cost"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0.5b",), "no file for the cost model. Give a name that ends in .json"),
        (("0.5b", "--out", "nowhere/cost.json"), "its directory does not exist"),
        (("70b", "--out", "cost.json"), "neither a recipe nor a known model. Known: 0.5b, 7b"),
        (("0.5b", "--out", "cost.json", "--device", "tpu"), "Known: auto, cpu, cuda"),
        (("0.5b", "train.steps=2", "--out", "cost.json"), "only a recipe has fields to change"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("schedule", "calibrate", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
