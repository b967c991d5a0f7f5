"""`raymix tune` without a cluster: bad input before anything runs, and runs that are all done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymix.laws import load_law, read_table
from raymix.recipe import load_recipe
from raymix.store import Corpus
from raymix.training.job import Job
from raymix.training.run.rundir import RunDirectory
from raymix.tuning.mixtures.candidates import Mixture, proxy_recipe, space_of, variant
from raymix.tuning.mixtures.search_log import CUT, SearchLog
from raymix.tuning.runs.group import locked
from raymix.tuning.runs.trial_task import RunTrial
from tests.support.laws import OwnShare
from tests.support.loops import train_corpus
from tests.unit.cli.test_cli import call

STEPS = 4
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Refused = Callable[..., list[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


@pytest.fixture
def here(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory that holds nothing but `r.yaml`."""
    document = {
        "name": "tiny",
        "corpus": {"path": corpus.path},
        "data": {"sequence_length": 32, "rows_per_step": 6},
        "model": {"type": "llama", "config": SIZES},
        "train": {"steps": 10 * STEPS, "lr": 0.01},
        "eval": {"rows_per_domain": 1},
        "cluster": {"gpus_per_worker": 0},
        "tune": {
            "runs": 3,
            "law": OwnShare.kind,
            "verify": 0,
            "proxy": {"train.steps": STEPS, "eval.every": 2},
        },
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Return a call of `raymix tune` that must end as bad input does, and write nothing."""

    def check(*args: str) -> list[str]:
        before = files(here)
        code, (out, err) = call("tune", "r.yaml", *args, "--json"), capfd.readouterr()
        assert code == 2, f"{args}: {code}\n{out}\n{err}"
        assert "Traceback" not in out + err
        assert files(here) == before
        problems: list[str] = json.loads(out)["problems"]
        assert all(f"error: {problem}" in err for problem in problems)
        return problems

    return check


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.law=bimx", "tune: law = 'bimx': not a law"),
        ("tune.design=latin", "tune.design = 'latin': not known"),
        ("tune.mode=optna", "Did you mean 'optuna'?"),
        ("mixer={kind: uniform, targets: [zz]}", "mixer.targets = 'zz': no domain of the corpus"),
        ("mixer={kind: uniform, targets: [a, b, c]}", "every domain is a target"),
        ("tune.weights={z: 1}", "tune.weights.z = 1.0: no domain of the corpus"),
        ("tune.caps={z: 0.5}", "tune.caps.z = 0.5: no domain of the corpus"),
        ("tune.floors={a: 0.6, b: 0.6}", "tune: floors = "),
        ("tune.caps={a: 0.2, b: 0.2, c: 0.2}", "tune: caps = 0.6"),
        ("tune.max_epochs=0.1", "no choice of mixture"),
        ("tune.runs=1", "tune.runs = 1"),
        ("tune.runs=2", "tune.runs = 2: too few runs for a law"),
        ("tune.horizon=3", "tune.horizon = 3: shorter than the small runs, which have 4 steps"),
        ("tune.proxy={cluster.workers: 2}", "tune.proxy.cluster.workers = 2: cannot differ"),
        ("tune.proxy={train.stesp: 2}", "tune.proxy: train.stesp = 2: unknown key"),
        ("train.parallel=fsdp2", "a small run is one process, whose model cannot be sharded"),
        ("corpus.path=nowhere", "no prepared corpus is here"),
    ],
)
def test_a_search_that_cannot_be_is_refused(refused: Refused, override: str, message: str) -> None:
    problems = refused(override)
    assert any(message in problem for problem in problems), problems
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parallel", "0"), "--parallel"),
        (("--if-exists", "maybe"), "--if-exists"),
        (("--ot", "x"), "No such option"),
    ],
)
def test_options_that_cannot_be_are_refused(
    here: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("tune", "r.yaml", *arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["r.yaml"]


def test_directories_of_something_else_are_left_alone(refused: Refused, here: Path) -> None:
    (here / "single").mkdir()
    (here / "single" / "resolved.yaml").write_text("name: x")
    (here / "thesis").mkdir()
    (here / "thesis" / "thesis.tex").touch()
    (here / "broken").mkdir()
    (here / "broken" / "design.json").write_text("{")
    for out, message in (
        ("r.yaml", "a file, not a directory"),
        ("single", "the directory of a single run"),
        ("thesis", "holds files but no search"),
    ):
        (problem,) = refused("--out", out)
        assert problem.startswith("--out = ")
        assert message in problem
    (problem,) = refused("--out", "broken", "--if-exists", "fail")
    assert "a search is here already" in problem


def test_two_searches_do_not_share_a_directory(refused: Refused, here: Path) -> None:
    with locked(here / "out", "search"):
        (problem,) = refused("--out", "out")
    assert "another search is running in it. Wait for it, or stop it." in problem


def train(here: Path, corpus: Corpus) -> list[Mixture]:
    """Make the small runs of a search, one after another in this process."""
    out, one = here / "out", load_recipe("r.yaml")
    proxy = proxy_recipe(one)
    mixtures = SearchLog.open(out, one, space_of(one, corpus), corpus.fingerprint).mixtures
    for mixture in mixtures:
        run = variant(proxy, mixture, out=str(out))
        directory = RunDirectory(Path(run.recipe.run_dir))
        job = Job(run.recipe, directory, STEPS, 6, on_gpu=False, threads=1, session="test")
        assert RunTrial(run.name, job, 1000).attempt(stop_requested=lambda: False) == {
            "state": "done"
        }
    return mixtures


def test_a_search_whose_runs_are_done_is_judged_again(
    here: Path, corpus: Corpus, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    mixtures = train(here, corpus)
    capfd.readouterr()
    assert call("tune", "r.yaml", "--out", "out", "--json") == 0
    document: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert [run["name"] for run in document["runs"]] == [m.name for m in mixtures]
    assert {run["state"] for run in document["runs"]} == {"done"}
    assert (document["rows"], document["steps"], document["horizon"]) == (6, STEPS, STEPS)
    assert read_table(here / "out" / "mixtures.csv").run_count == 3
    assert load_law(here / "out" / "law.json").kind == OwnShare.kind
    assert all(Path(file).is_file() for file in document["files"])
    assert document["verified"]["optimum"]["measured"]["mean"] is None

    # Other questions of the same runs: only what is concluded differs.
    metrics = {path: path.stat().st_mtime_ns for path in here.glob("out/*/metrics.jsonl")}
    again = ("tune.weights={c: 1}", "tune.horizon=400", "tune.extrapolate=true")
    assert call("tune", "r.yaml", *again, "--out", "out", "--json") == 0
    other = json.loads(capfd.readouterr().out)
    assert (other["weights"], other["horizon"]) == ({"c": 1.0}, 400)
    assert other["path"][-1]["step"] == 400
    assert metrics == {path: path.stat().st_mtime_ns for path in here.glob("out/*/metrics.jsonl")}

    # A run that was cut is not taken up again, and its losses count.
    (here / "out" / "mix-001" / CUT).touch()
    assert call("tune", "r.yaml", "--out", "out", "--json") == 0
    cut = json.loads(capfd.readouterr().out)
    assert [run["state"] for run in cut["runs"]] == ["done", "stopped", "done"]
    assert (cut["rows"], cut["failed"]) == (6, 0)

    (problem,) = refused("--out", "out", "tune.concentration=7")
    assert "tune.concentration: 1.0 -> 7.0" in problem
    problems = refused("--out", "out", "tune.proxy={train.steps: 8}")
    assert all("train.steps: 4 -> 8" in problem for problem in problems)
