"""A search for the best shares through Ray Tune: small runs, a law, its optimum, verified."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raymix.cli.main import app
from raymix.laws import law_from_dict, read_table
from raymix.store import Corpus
from tests.e2e.ray.test_compare import SIZES
from tests.support.laws import OwnShare
from tests.support.loops import train_corpus
from tests.support.paths import ROOT
from tests.support.shell import wait_for

STEPS = 12
SEEDS = (6, 7)


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
        "model": {"type": "llama", "config": SIZES},
        "train": {"steps": 4 * STEPS, "lr": 0.01, "checkpoint_every": 4},
        "eval": {"every": 4, "rows_per_domain": 2},
        "cluster": {"workers": 1, "gpus_per_worker": 0},
        "tune": {
            "runs": 4,
            "law": OwnShare.kind,
            "verify": 2,
            "caps": {"a": 0.7},
            "proxy": {"train": {"steps": STEPS}},
        },
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(recipe: Path, out: Path, *more: str) -> tuple[int, Any, str]:
    done = CliRunner().invoke(app, ["tune", str(recipe), "--out", str(out), "--json", *more])
    return done.exit_code, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune") / "of {braces}"


@pytest.fixture(scope="module")
def first(ray_cluster: None, recipe: Path, out: Path) -> tuple[Any, str]:
    code, document, said = run(recipe, out)
    assert code == 0, said
    return document, said


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(run_dir: Path) -> dict[str, float]:
    last = [line["eval"] for line in lines(run_dir / "metrics.jsonl") if "eval" in line][-1]
    return {name: row["loss"] for name, row in last.items()}


def test_the_table_holds_every_evaluation(first: tuple[Any, str], out: Path) -> None:
    document, said = first
    assert "Traceback" not in said
    assert "4 runs of 12 steps" in said
    table = read_table(out / "mixtures.csv")
    assert (table.domains, table.targets) == (("a", "b", "c"), ("a", "b", "c"))
    assert (table.run_count, len(table)) == (4, 12)
    assert sorted(set(table.step_R)) == [4, 8, 12]
    assert table.share_RD[:, 0].max() <= 0.7 + 1e-9
    assert table.share_RD.min() >= 0.1 / 3 - 1e-6
    for row, name in enumerate(table.runs):
        if table.step_R[row] == STEPS:
            assert dict(zip("abc", table.loss_RV[row], strict=True)) == final(out / name)
            about = yaml.safe_load((out / name / "resolved.yaml").read_text())
            assert about["mixer"]["weights"] == dict(zip("abc", table.share_RD[row], strict=True))
            assert (about["seed"], about["train"]["steps"]) == (5, STEPS)
    assert document["rows"] == 12


def test_what_was_predicted_is_beside_what_was_measured(first: tuple[Any, str], out: Path) -> None:
    document, said = first
    rows = document["verified"]
    assert list(rows) == ["optimum", "best observed", "runner-up", "uniform", "proportional"]
    assert document["seeds"] == list(SEEDS)
    fitted = law_from_dict(json.loads((out / "law.json").read_text()))
    for role, row in rows.items():
        names = [f"verify-{row['mixture']}-seed{seed}" for seed in SEEDS]
        means = [sum(final(out / name).values()) / 3 for name in names]
        assert list(row["measured"]["by_seed"].values()) == pytest.approx(means), role
        assert row["predicted"]["low"] < row["predicted"]["value"] < row["predicted"]["high"]
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert rows["uniform"]["shares"] == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-5)
    assert rows["proportional"]["shares"]["a"] == pytest.approx(0.5, abs=0.01)
    losses = rows["uniform"]["measured"]["by_seed"], rows["optimum"]["measured"]["by_seed"]
    gain = sum(losses[1][str(seed)] - losses[0][str(seed)] for seed in SEEDS) / 2
    assert rows["optimum"]["against"]["uniform"]["mean"] == pytest.approx(gain)
    ranked = sorted((run["value"], run["name"]) for run in document["runs"])
    assert [rows[role]["mixture"] for role in ("best observed", "runner-up")] == [
        ranked[0][1], ranked[1][1],
    ]  # fmt: skip
    assert fitted.kind == OwnShare.kind
    for words in ("BiMix as published", "> 0.97", "< 0.2 %", "optimum", "proportional"):
        assert words in said


def test_the_files_are_whole(first: tuple[Any, str], out: Path) -> None:
    document, _ = first
    assert json.loads((out / "tune.json").read_text())["verified"] == document["verified"]
    html = (out / "tune.html").read_text()
    # Agreement, shares, path; a slice per domain; coefficients per loss.
    assert html.count("<svg") == 3 + 3 + 3
    assert "://" not in html.replace("http://www.w3.org/", "")
    assert [spot["step"] for spot in document["path"]][-1] == 4 * STEPS
    assert not (out / ".tune").exists()


def test_finished_runs_are_not_repeated(first: tuple[Any, str], recipe: Path, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    assert len(before) == 4 + 2 * len({r["mixture"] for r in first[0]["verified"].values()})
    code, document, said = run(recipe, out)
    assert (code, document["verified"]) == (0, first[0]["verified"])
    assert "runs of" not in said
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}


def test_another_design_is_refused(first: tuple[Any, str], recipe: Path, out: Path) -> None:
    code, document, _ = run(recipe, out, "tune.concentration=9")
    assert code == 2
    for words in ("--out = ", "tune.concentration: 1.0 -> 9.0", "--if-exists new"):
        assert words in document["problems"][0]
    code, document, _ = run(recipe, out, "tune.proxy={train.steps: 8}")
    assert code == 2
    assert "train.steps: 12 -> 8" in document["problems"][0]
    code, document, _ = run(recipe, out, "--if-exists", "fail")
    assert (code, "a search is here already" in document["problems"][0]) == (2, True)


def test_each_run_follows_from_those_before(
    ray_cluster: None, recipe: Path, tmp_path: Path
) -> None:
    changes = ["tune.mode=sequential", "tune.initial=3", "tune.verify=0"]
    code, document, said = run(recipe, tmp_path / "out", *changes, "tune.runs=5")
    assert code == 0, said
    origins = [run["origin"] for run in document["runs"]]
    assert origins[:3] == ["dirichlet"] * 3
    assert all("expected improvement" in origin for origin in origins[3:])
    assert [run["state"] for run in document["runs"]] == ["done"] * 5

    # More runs: those there are kept, whatever the number.
    shares = {run["name"]: run["shares"] for run in document["runs"]}
    code, document, said = run(recipe, tmp_path / "out", *changes, "tune.runs=6")
    assert code == 0, said
    assert "6 runs of 12 steps (2,304 tokens), 5 of them finished before" in said
    assert {run["name"]: run["shares"] for run in document["runs"][:5]} == shares


def test_runs_of_high_loss_are_cut_by_asha(ray_cluster: None, recipe: Path, tmp_path: Path) -> None:
    # Losses are looked at a few times a second, so runs must take some seconds.
    steps = 400
    changes = ["tune.scheduler=asha", "tune.runs=6", "tune.verify=0", "eval.every=100"]
    changes += [f"tune.proxy={{train.steps: {steps}, train.checkpoint_every: 200}}"]
    code, document, said = run(recipe, tmp_path / "out", *changes, "--parallel", "1")
    assert code == 0, said
    states = {run["name"]: (run["state"], run["step"]) for run in document["runs"]}
    cut = {name for name, (state, _) in states.items() if state == "stopped"}
    assert cut
    assert all(states[name][1] < steps for name in cut)
    assert {states[name] for name in states if name not in cut} == {("done", steps)}
    assert read_table(tmp_path / "out" / "mixtures.csv").run_count == 6
    code, document, said = run(recipe, tmp_path / "out", *changes)
    assert "runs of" not in said
    assert {run["name"] for run in document["runs"] if run["state"] == "stopped"} == cut


def test_a_killed_search_goes_on(recipe: Path, tmp_path: Path) -> None:
    changes = ["tune.proxy={train.steps: 60}", "tune.verify=1", "tune.runs=5"]
    out = tmp_path / "out"
    program = (
        "import tests.support.laws; from raymix.cli import _run; "
        "from raymix.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "tune", str(recipe), *changes, "--json"]
    command += ["--out", str(out), "--parallel", "1", "--set", "cluster.address=local"]
    command += ["--set", "cluster.object_store_bytes=100000000"]
    root = str(ROOT)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])

    def done() -> list[Path]:
        return [
            p.parent
            for p in out.glob("mix-*/metrics.jsonl")
            if lines_of(p) and lines_of(p)[-1]["step"] == 60
        ]

    def lines_of(path: Path) -> list[dict[str, Any]]:
        whole = path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    process = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
    wait_for(lambda: len(done()) >= 2, seconds=400, what="two finished runs")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    metrics = {path: (path / "metrics.jsonl").read_bytes() for path in done()}
    assert 2 <= len(metrics) < 5

    ended = subprocess.run(command, env=environment, cwd=tmp_path, check=False, **pipes)
    assert ended.returncode == 0, ended.stderr
    # A worker may end its run in the moment in which its driver is gone already.
    again = re.search(r"5 runs of 60 steps .*, (\d) of them finished before", ended.stderr)
    assert again is not None, ended.stderr
    assert len(metrics) <= int(again[1]) < 5
    assert metrics == {path: (path / "metrics.jsonl").read_bytes() for path in metrics}
    assert json.loads(ended.stdout)["failed"] == 0
