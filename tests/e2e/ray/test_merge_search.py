"""A search of a merge through Ray Tune: killed and run again, it ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.merging import merge
from raymix.store import Corpus
from tests.support.loops import VOCAB, train_corpus
from tests.support.shell import wait_for

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000})


@pytest.fixture(scope="module")
def recipe(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = {
        "name": "tiny",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "train": {"steps": 4},
        "eval": {"rows_per_domain": 4},
        "cluster": {"gpus_per_worker": 0},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a merge file of a base and two models; half of their deltas is best at scale 1/2."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **SIZES, **HEADS)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for number in (1, 2):
        torch.manual_seed(number)
        model = LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn_like(weight)
        model.save_pretrained(folder / f"task{number}")
    document = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "task1"}, {"model": "task2"}],
        "parameters": {"density": 0.5},
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(document))
    return folder / "merge.yaml"


def options(family: Path, recipe: Path, out: Path, *more: str) -> list[str]:
    words = ["merge", str(family), "--search", "scale,drop", "--eval", str(recipe)]
    return [*words, "--out", str(out), "--workers", "2", "--trials", "7", *more]


def run(family: Path, recipe: Path, out: Path, *more: str) -> tuple[int, Any, str]:
    done = CliRunner().invoke(app, [*options(family, recipe, out, *more), "--json"])
    return done.exit_code, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def first(
    ray_cluster: None, family: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("first") / "merged"
    code, document, said = run(family, recipe, out)
    assert code == 0, said
    assert "Traceback" not in said
    return document, out


def test_the_chosen_merge_is_the_best_point(first: tuple[dict[str, Any], Path]) -> None:
    document, out = first
    points = document["points"]
    assert [point["number"] for point in points] == list(range(7))
    assert points[0]["options"] == {"scale": 1.0, "drop": 0.5}
    least = min(points, key=lambda point: point["loss"])
    assert document["best"] == least["options"]
    for point in points:
        losses = point["losses"]
        assert set(losses) == {"a", "b"}
        assert point["loss"] == pytest.approx(sum(losses.values()) / 2)
    assert list(document["test"]) == ["0 base", "1 task1", "2 task2", "as given", "chosen"]
    AutoModelForCausalLM.from_pretrained(out)
    assert (out / "merge_report.json").is_file()


def test_the_file_it_writes_makes_the_same_merge(
    first: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, out = first
    folder = out.with_name("merged-search")
    merge(folder / "merge.yaml", tmp_path / "again")
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {"search.svg", "search_result.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob(".merge*"))


def test_nothing_reported_was_chosen_by(first: tuple[dict[str, Any], Path]) -> None:
    document, _ = first
    given = document["points"][0]["losses"]
    tested = document["test"]["as given"]["domains"]
    assert all(given[name] != tested[name] for name in given)
    assert document["held_out"]["test_rows"] == 4


def test_killed_and_run_again_it_ends_the_same(
    first: tuple[dict[str, Any], Path], family: Path, recipe: Path, tmp_path: Path
) -> None:
    import ray

    document, whole = first
    out, folder = tmp_path / "merged", tmp_path / "merged-search"
    process = subprocess.Popen(
        [sys.executable, "-m", "raymix", *options(family, recipe, out)],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (folder / "001.json").exists(), seconds=500, what="two points")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("00*.json")}
    code, again, said = run(family, recipe, out)
    assert code == 0, said
    same = ("points", "best", "test", "loss", "search", "held_out")
    assert {key: again[key] for key in same} == {key: document[key] for key in same}
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_search_in_the_same_place_is_refused(
    first: tuple[dict[str, Any], Path], family: Path, recipe: Path, tmp_path: Path
) -> None:
    _, out = first
    code, document, _ = run(family, recipe, out)
    assert code == 2
    assert "it exists, and nothing is overwritten" in document["problems"][0]
    folder = tmp_path / "other-search"
    folder.mkdir()
    (folder / "search.json").write_text("{}")
    code, document, _ = run(family, recipe, tmp_path / "other", "parameters.density=0.4")
    assert code == 2
    assert "another search is here" in document["problems"][0]
