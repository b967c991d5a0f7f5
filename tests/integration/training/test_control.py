"""Shares of a run changed while it trains, by `raymix.connect` and `raymix weights`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import raymix
from raymix.cli.main import app
from raymix.errors import RecipeError, TrainingError
from raymix.loader import MixtureLoader
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.job import Job
from raymix.training.launch.local import run_in_process
from raymix.training.run.rundir import RunDirectory, open_run, read_metrics
from tests.support.loops import train_corpus
from tests.support.streams import TokensMixer

STEPS = 24
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}
OTHER = {"a": 0.1, "b": 0.1, "c": 0.8}


class Killed(Exception):
    """Ends a run in mid-step, as a kill does: nothing is written any more."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


def recipe(corpus: Corpus, directory: Path) -> Recipe:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Recipe.model_validate(
        {
            "name": "run",
            "corpus": {"path": corpus.path},
            "data": {"sequence_length": 32, "rows_per_step": 10},
            "mixer": {"kind": "static", "weights": SHARES},
            "model": {"type": "llama", "config": sizes | heads},
            "train": {"steps": STEPS, "checkpoint_every": 5, "probe_interval": 4},
            "eval": {"rows_per_domain": 1},
            "cluster": {"workers": 0},
            "run": {"dir": str(directory / "{name}"), "tensorboard": False},
        }
    )


def train(used: Recipe, session: str, at_step: dict[int, Callable[[], object]]) -> RunDirectory:
    """Train in this process; `at_step` has what happens while a step is being trained."""
    run = open_run(used, "resume")
    run.write_recipe(used)
    (run.path / "environment.json").write_text(json.dumps({"steps": STEPS}))
    job = Job(used, run, STEPS, micro_batch_rows=10, on_gpu=False, threads=1, session=session)

    def during_step() -> bool:
        # A lease covers 0.05 s of steps: with longer steps it is one step.
        time.sleep(0.06)
        done = [line["step"] for line in read_metrics(run.metrics) if "loss" in line]
        at_step.pop(done[-1] if done else 0, lambda: None)()
        return False

    with run.locked():
        run_in_process(job, stop_requested=during_step)
    assert not at_step
    return run


class Command:
    """A command of another process, here a thread: it waits while the run goes on."""

    def __init__(self, directory: Path, call: Callable[[], Any]) -> None:
        self._folder, self._call = directory / "requests", call
        self.result: Any = None
        self._thread = threading.Thread(target=self._work)

    def __call__(self) -> None:
        """Start it, and return once its request lies in the run directory."""
        self._thread.start()
        while self._thread.is_alive() and not list(self._folder.glob("*.json")):
            self._thread.join(0.005)

    def end(self) -> Any:
        self._thread.join(30)
        return self.result

    def _work(self) -> None:
        self.result = self._call()


def shares_by_step(run: RunDirectory) -> list[dict[str, float]]:
    return [line["shares"] for line in read_metrics(run.metrics) if "loss" in line]


def cli(*words: str) -> Callable[[], tuple[int, dict[str, Any]]]:
    """Return a call of the command in a process of its own: exit code and document."""
    line = [sys.executable, "-m", "raymix", "weights", *words, "--json"]

    def call() -> tuple[int, dict[str, Any]]:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    return call


def test_a_request_is_in_force_two_steps_later(corpus: Corpus, tmp_path: Path) -> None:
    used, path = recipe(corpus, tmp_path), tmp_path / "run"
    words = [f"{name}={share}" for name, share in OTHER.items()]
    change = Command(path, cli(str(path), *words))
    back = Command(path, cli(str(path), "--release", "--from-step", "12"))
    refused = Command(path, cli(str(path), "a=0.5", "boks=0.5"))
    run = train(used, "one", {3: change, 5: refused, 7: back})
    answer = {"first_step": 4, "until": None}
    assert change.end() == (0, {"run": str(path), "shares": OTHER, "hold": False, **answer})
    assert back.end()[1]["first_step"] == 12
    code, refusal = refused.end()
    assert code == 2
    (problem,) = refusal["problems"]
    assert problem.startswith("weights.boks = 0.5: the corpus has no such domain")
    seen = shares_by_step(run)
    # Asked for while step 3 was trained on (steps count from 0).
    assert seen == [SHARES] * 4 + [pytest.approx(OTHER)] * 8 + [SHARES] * 12
    log = [json.loads(line) for line in run.mixture_log.read_text().splitlines()]
    assert [(e["first_step"], e["mixer"]) for e in log] == [
        (0, "static"),
        (4, "asked"),
        (12, "static"),
    ]
    assert list((path / "requests").iterdir()) == []
    document = raymix.connect(run.path).weights()
    assert document == {
        "run": str(path),
        "in_work": False,
        "shares": SHARES,
        "first_step": 12,
        "by": "static",
        "hold": False,
        "to_come": [],
    }
    with pytest.raises(RecipeError, match="the run is finished"):
        raymix.connect(run.path).set_weights(OTHER)


def test_a_hold_survives_a_kill(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("raymix.training.setup", "raymix.streaming.controller.build"):
        monkeypatch.setattr(f"{module}.build_mixer", lambda config, context: TokensMixer(3))
    used, path = recipe(corpus, tmp_path), tmp_path / "run"
    free = train(used.model_copy(update={"name": "free"}), "free", {})

    def kill() -> None:
        raise Killed

    def look() -> None:
        document = raymix.connect(path).weights()
        assert document["in_work"]
        assert (document["by"], document["hold"]) == ("request", True)
        assert document["first_step"] == 7
        assert document["to_come"] == [{"first_step": 21, "shares": None, "hold": False}]

    hold = Command(path, lambda: raymix.connect(path).set_weights(OTHER, hold=True))
    later = Command(path, lambda: raymix.connect(path).release(21))
    with pytest.raises(Killed):
        # After the checkpoint of step 5, before that of step 10.
        train(used, "one", {6: hold, 7: later, 9: kill})
    assert hold.end() == {"first_step": 7, "until": None}
    run = train(used, "two", {14: look})
    seen = shares_by_step(run)
    assert seen[:7] == shares_by_step(free)[:7]
    assert seen[7:21] == [pytest.approx(OTHER)] * 14
    log = [json.loads(line) for line in run.mixture_log.read_text().splitlines()]
    assert [(e["first_step"], e["mixer"]) for e in log][1:6] == [
        (7, "asked"),
        (8, "asked"),
        (12, "asked"),
        (16, "asked"),
        (20, "asked"),
    ]
    # The mixer goes on with what it has learned under the held shares.
    own = dict(zip("abc", log[5]["stats"]["mixer"], strict=True))
    assert seen[21:] == [pytest.approx(own)] * 3


def test_a_run_that_does_not_answer(corpus: Corpus, tmp_path: Path) -> None:
    run = open_run(recipe(corpus, tmp_path), "resume")
    run.write_recipe(recipe(corpus, tmp_path))
    with pytest.raises(RecipeError, match="the run is not in work"):
        raymix.connect(run.path).set_weights(OTHER)
    with run.locked(), pytest.raises(TrainingError, match="has not answered; the request is with"):
        raymix.connect(run.path, timeout_s=0.2).set_weights(OTHER)
    assert list((run.path / "requests").iterdir()) == []
    assert raymix.connect(run.path).weights()["shares"] is None
    other = tmp_path / "other"
    other.mkdir()
    for place, problem in ((other, "not a run directory"), ("s3://bucket/x", "on the machine")):
        with pytest.raises(RecipeError, match=problem):
            raymix.connect(place)


def test_a_url_stands_for_its_directory_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = "s3://bucket/runs/my"
    working = RunDirectory.at(url).path
    working.mkdir(parents=True)
    (working / "resolved.yaml").touch()
    document = raymix.connect(url).weights()
    assert (document["run"], document["in_work"]) == (url, False)
    with RunDirectory.at(url).locked():
        assert raymix.connect(url).weights()["in_work"]


def test_a_loader_takes_requests_too(corpus: Corpus, tmp_path: Path) -> None:
    place = tmp_path / "own"
    loader = MixtureLoader(recipe(corpus, tmp_path), rank=0, world_size=1, run_dir=place)
    command = Command(place, lambda: raymix.connect(place).set_weights(OTHER))
    for batch in loader:
        assert batch
        loader.step()
        if loader.step_trained == 3:
            command()
    # Steps 3 and 4 may have been read or decided by then, as the loader reads ahead.
    first = command.end()["first_step"]
    assert 3 <= first <= 5
    entry = loader.mixture_log.at(first)
    assert (entry.first_step, entry.mixer) == (first, "asked")
    document = raymix.connect(place).weights()
    assert (document["first_step"], document["by"]) == (first, "request")
    assert document["in_work"] is None


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a"], "weights = 'a': not a share"),
        (["a=x"], "weights = 'a=x': not a share"),
        (["a=nan"], "weights = 'a=nan': not a share"),
        (["a=1", "a=0"], "weights.a = 0.0: given twice"),
        (["--release", "a=1"], "--release = True: the mixer decides"),
        (["--hold"], "--hold = True: no shares are given"),
        (["--from-step", "3"], "--from-step = 3: no shares are given"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, words: list[str], problem: str) -> None:
    done = CliRunner().invoke(app, ["weights", str(tmp_path), *words, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["problems"][0].startswith(problem)
