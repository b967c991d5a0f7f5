"""A comparison through Ray Tune: every run once, resumed where it stopped, one table."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.store import Corpus
from tests.support.loops import train_corpus
from tests.support.shell import wait_for

STEPS = 12
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


@pytest.fixture(scope="module")
def recipe(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = {
        "name": "tiny",
        "seed": 5,
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 6},
        "mixer": {"kind": "static", "weights": {"a": 0.9, "b": 0.1}, "targets": ["c"]},
        "model": {"type": "llama", "config": SIZES},
        "train": {"steps": STEPS, "lr": 0.01, "checkpoint_every": 4},
        "eval": {"every": 4, "rows_per_domain": 2},
        "cluster": {"workers": 1, "gpus_per_worker": 0},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(
    recipe: Path, out: Path, *more: str, mixers: str = "uniform,static"
) -> tuple[int, Any, str]:
    options = ["--mixers", mixers, "--seeds", "2", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, ["compare", str(recipe), *options, *more])
    return done.exit_code, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "of {braces}"


@pytest.fixture(scope="module")
def first(ray_cluster: None, recipe: Path, out: Path) -> tuple[Any, str]:
    code, document, said = run(recipe, out)
    assert code == 0, said
    return document, said


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_says_what_the_runs_say(first: tuple[Any, str], out: Path) -> None:
    document, said = first
    assert "(raylet)" not in said
    assert "Traceback" not in said
    assert "4 runs of 12 steps" in said
    assert (document["domains"], document["targets"]) == (["a", "b"], ["c"])
    assert (document["seeds"], document["baseline"]) == ([5, 6], "uniform")
    for mixer, row in document["mixers"].items():
        assert (row["runs"], row["planned"]) == (2, 2)
        for seed in (5, 6):
            metrics = lines(out / f"{mixer}-seed{seed}" / "metrics.jsonl")
            last = [line["eval"] for line in metrics if "eval" in line][-1]
            losses = {name: last[name]["loss"] for name in "abc"}
            means = row["mean"]["by_seed"], row["worst"]["by_seed"], row["target"]["by_seed"]
            mean, worst, target = (by_seed[str(seed)] for by_seed in means)
            assert mean == pytest.approx((losses["a"] + losses["b"]) / 2)
            assert worst == max(losses["a"], losses["b"])
            assert target == losses["c"]
        assert row["extra"]["flops_share"]["mean"] == 0
        assert row["curve"]["step"] == [0, 4, 8, 12]
        assert row["curve"]["tokens"] == [step * 6 * 32 for step in (0, 4, 8, 12)]
        assert row["curve"]["flops"][-1] == pytest.approx(
            document["flops_per_token"] * document["tokens"]
        )
    assert document["mixers"]["uniform"]["mean"]["difference"]["mean"] == 0
    shares = document["mixers"]["static"]["shares"]
    assert (shares["a"], shares["c"]) == (pytest.approx(0.9), 0)


def test_runs_of_several_workers_come_to_the_same(
    first: tuple[Any, str], recipe: Path, tmp_path: Path
) -> None:
    """Ray Train inside the trial; the order of the data knows nothing of workers."""
    out, changes = tmp_path / "workers", ["cluster.workers_per_trial=2", "--seeds", "1"]
    code, document, said = run(recipe, out, *changes, mixers="uniform")
    assert code == 0, said
    assert "1 at once, 2 workers of 1 thread each" in said
    alone = first[0]["mixers"]["uniform"]["mean"]["by_seed"]["5"]
    assert document["mixers"]["uniform"]["mean"]["by_seed"]["5"] == pytest.approx(alone, abs=1e-4)
    about = json.loads((out / "uniform-seed5" / "environment.json").read_text())
    assert about["workers"] == 2
    refused = run(recipe, tmp_path / "none", "cluster.workers_per_trial=64")
    assert refused[0] == 2
    assert "64 workers need 64 CPUs" in refused[1]["problems"][0]


def test_same_seeds_start_from_the_same_model(first: tuple[Any, str], out: Path) -> None:
    evaluations = {path.parent.name: lines(path)[0]["eval"] for path in out.glob("*/metrics.jsonl")}
    assert evaluations["uniform-seed5"] == evaluations["static-seed5"]
    assert evaluations["uniform-seed5"] != evaluations["uniform-seed6"]


def test_the_files_are_whole(first: tuple[Any, str], out: Path) -> None:
    document, _ = first
    assert json.loads((out / "compare.json").read_text())["mixers"] == document["mixers"]
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert len(rows) == 4
    for row in rows:
        assert sum(float(row[f"share.{name}"]) for name in "abc") == pytest.approx(1)
        assert float(row["loss.c"]) > 0
    html = (out / "compare.html").read_text()
    assert html.count("<svg") == 3 * 2 + 3
    assert "://" not in html.replace("http://www.w3.org/", "")
    assert not (out / ".tune").exists()
    assert not (out / ".stop").exists()


def test_finished_runs_are_not_repeated_and_begun_ones_go_on(
    first: tuple[Any, str], recipe: Path, out: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    code, document, said = run(recipe, out)
    assert (code, document["mixers"]) == (0, first[0]["mixers"])
    assert "runs of" not in said
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}

    # As a run looks that has not begun; the others stay as they are.
    shutil.rmtree(out / "static-seed6")
    code, document, said = run(recipe, out)
    assert code == 0, said
    assert "3 of them finished before" in said
    assert document["mixers"]["static"]["mean"] == first[0]["mixers"]["static"]["mean"]
    stamps = {path: old for path, old in before.items() if path.parent.name != "static-seed6"}
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_an_interrupted_comparison_goes_on(ray_cluster: None, recipe: Path, tmp_path: Path) -> None:
    import ray

    out, changes = tmp_path / "out", ["train.steps=800", "eval.every=400"]
    options = ["--mixers", "uniform,static", "--seeds", "2", "--parallel", "2", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "raymix", "compare", str(recipe), *options, *changes],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = out / "uniform-seed5" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(lines(metrics)) > 20, seconds=400, what="steps")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert "Stopping with checkpoints" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert "worker.py" not in said  # no Ray of Tune's own after ours
    (checkpoint,) = (out / "uniform-seed5" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 0 < step < 800
    assert not (out / "static-seed6").exists()

    begun = metrics.read_text().splitlines()
    code, document, said = run(recipe, out, *changes, "--seeds", "1", mixers="uniform")
    assert code == 0, said
    assert document["mixers"]["uniform"]["curve"]["step"] == [0, 400, 800]
    # The steps up to the checkpoint are those made before, to the byte.
    saved_lines = [line for line in begun if json.loads(line)["step"] <= step]
    assert metrics.read_text().splitlines()[: len(saved_lines)] == saved_lines


def test_a_run_that_fails_is_told_and_the_others_end(
    ray_cluster: None, recipe: Path, tmp_path: Path
) -> None:
    # A lock that is a directory ends one run before it begins.
    (tmp_path / "uniform-seed5").mkdir()
    (tmp_path / "uniform-seed5" / ".lock").mkdir()
    code, document, _ = run(recipe, tmp_path, "--seeds", "1", "--parallel", "2")
    assert code == 1
    assert document["failed"] == 1
    states = {run["mixer"]: (run["state"], run["problem"]) for run in document["runs"]}
    assert states["static"] == ("done", None)
    assert states["uniform"][0] == "failed"
    assert "IsADirectoryError" in (states["uniform"][1] or "")
    assert document["mixers"]["uniform"]["mean"]["mean"] is None
    assert document["mixers"]["static"]["mean"]["mean"] > 0
    assert "uniform, seed 5" in (tmp_path / "compare.html").read_text()


def test_what_another_recipe_left_is_refused(
    first: tuple[Any, str], recipe: Path, out: Path
) -> None:
    code, document, _ = run(recipe, out, "train.lr=0.02", "eval.rows_per_domain=1")
    assert code == 2
    assert len(document["problems"]) == 4
    for words in ("uniform-seed5 = ", "train.lr: 0.01 -> 0.02", "eval.rows_per_domain: 2 -> 1"):
        assert words in document["problems"][0]
