"""Specialists of a tiny corpus, made, merged and compared; what is finished is not made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.store import Corpus
from tests.support.loops import train_corpus

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    sizes = {"a": 9000, "b": 6000, "c": 3000}
    return train_corpus(tmp_path_factory.mktemp("corpus"), sizes)


def recipe_of(corpus: Corpus, folder: Path, **changes: Any) -> Path:
    document = {
        "name": "tiny",
        "seed": 3,
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "mixer": {"kind": "uniform"},
        "model": {"type": "llama", "config": SIZES | HEADS},
        "train": {"steps": 12, "lr": 0.01},
        "eval": {"rows_per_domain": 4},
        "cluster": {"workers": 1, "gpus_per_worker": 0},
        "specialists": {
            "domains": ["a", "b"],
            "finetune": {"train": {"steps": 8, "lr": 0.005}},
            "methods": {
                "drm": {"merge_method": "drm", "drop": 0.5},
                "mean": {"merge_method": "linear"},
            },
            "trials": 5,
        },
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(recipe: Path, out: Path, *more: str) -> tuple[int, Any, str]:
    words = ["specialists", str(recipe), "--out", str(out), "--parallel", "2", "--json", *more]
    done = CliRunner().invoke(app, words)
    return done.exit_code, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("specialists")


@pytest.fixture(scope="module")
def first(ray_cluster: None, corpus: Corpus, place: Path) -> tuple[Any, str]:
    code, document, said = run(recipe_of(corpus, place), place / "out")
    assert code == 0, said
    assert "Traceback" not in said
    return document, said


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_evaluation(run: Path) -> dict[str, Any]:
    return [line for line in lines(run / "metrics.jsonl") if "eval" in line][-1]["eval"]


def test_everything_starts_from_one_base(first: tuple[Any, str], place: Path) -> None:
    document, _ = first
    out = place / "out"
    base = last_evaluation(out / "base-seed3")
    for name in ("specialist-a", "specialist-b", "joint"):
        metrics = lines(out / f"{name}-seed3" / "metrics.jsonl")
        assert metrics[0]["eval"] == base
        read = {domain for line in metrics for domain in line.get("counts", {})}
        assert read == ({"a", "b"} if name == "joint" else {name[-1]})
    assert document["tokens"] == 8 * 4 * 32
    assert document["joint_tokens"] == 2 * document["tokens"]
    mean = document["rows"]["base"]["mean"]["mean"]
    assert mean == pytest.approx((base["a"]["loss"] + base["b"]["loss"]) / 2)


def test_each_domain_is_by_its_own_specialist(first: tuple[Any, str], place: Path) -> None:
    document, _ = first
    row = document["rows"]["specialists"]
    assert row["recovered"]["mean"] == 1
    for name in "ab":
        last = last_evaluation(place / "out" / f"specialist-{name}-seed3")
        assert row["domains"][name]["mean"] == last[name]["loss"]
        assert document["matrix"][name] == {other: last[other]["loss"] for other in "ab"}


def test_merges_are_chosen_on_other_rows_than_reported(first: tuple[Any, str], place: Path) -> None:
    document, _ = first
    drm, mean = document["merges"]["drm"], document["merges"]["mean"]
    assert len(drm["curves"]["3"]) == 5
    result = json.loads((place / "out" / "merges" / "drm-seed3" / "result.json").read_text())
    best = min(result["points"], key=lambda point: point["loss"])
    assert drm["scale"]["mean"] == best["options"]["scale"]
    assert result["points"][0]["losses"] != result["test"]["given"]
    assert mean["scale"] is None
    assert mean["given"] == mean["best"]
    assert document["failed"] == 0


def test_what_is_finished_is_not_made_again(
    first: tuple[Any, str], corpus: Corpus, place: Path
) -> None:
    document, _ = first
    out = place / "out"
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    shutil.rmtree(out / "merges" / "mean-seed3")
    # As a search looks that was killed after its second point.
    for name in ("002.json", "003.json", "004.json", "result.json"):
        (out / "merges" / "drm-seed3" / name).unlink()
    code, again, said = run(recipe_of(corpus, place), out)
    assert code == 0, said
    assert "runs of" not in said
    assert "2 searches of merges, 0 of them finished before" in said
    for key in ("rows", "merges", "differences", "matrix"):
        assert again[key] == document[key]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert json.loads((out / "specialists.json").read_text())["rows"] == document["rows"]
    assert "specialists merged" in (out / "specialists.html").read_text()


def test_a_base_that_is_given_is_not_trained(
    first: tuple[Any, str], corpus: Corpus, place: Path, tmp_path: Path
) -> None:
    (checkpoint,) = (place / "out" / "base-seed3" / "checkpoints").iterdir()
    model = {"kind": "pretrained", "path": str(checkpoint)}
    code, document, said = run(recipe_of(corpus, tmp_path, model=model), tmp_path / "out")
    assert code == 0, said
    assert not (tmp_path / "out" / "base-seed3").exists()
    assert document["base"] == str(checkpoint)
    assert document["rows"] == first[0]["rows"]
    assert document["merges"] == first[0]["merges"]
