"""Files of a run, damaged: gone on with, drawn, watched, exported and scored, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymix.recipe import Recipe
from raymix.report.data.live import LiveRun
from raymix.report.data.read import read_run
from raymix.report.data.summary import summarize
from raymix.training.api import train
from raymix.training.evaluate.export import export
from raymix.training.evaluate.score import score
from tests.support.fuzzing import damaged, outcome
from tests.support.loops import smallest_run

CASES = [60, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
READ = [200, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
FILES = ("metrics.jsonl", "mixture_log.jsonl", "environment.json", "resolved.yaml")
CHECKPOINT = ("state.json", "optimizer.safetensors", "model.safetensors", "config.json")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return smallest_run(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    shutil.copytree(recipe.run_dir, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("cases", READ)
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_read(name: str, cases: int, run: Path) -> None:
    raw = (run / name).read_bytes()
    for case in range(cases):
        (run / name).write_bytes(damaged(raw, case))
        label = f"{name} case {case}"
        outcome(lambda: summarize(read_run(run)), f"report, {label}")
        outcome(lambda: watch_once(run), f"watch, {label}")


def watch_once(run: Path) -> dict[str, Any]:
    watched = LiveRun(run)
    watched.poll()
    return watched.document()


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints(name: str, cases: int, run: Path, recipe: Recipe, tmp_path: Path) -> None:
    moved = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(run)})})
    (run / "resolved.yaml").write_text(yaml.safe_dump(moved.model_dump(mode="json")))
    newest = max((run / "checkpoints").iterdir())
    raw, out = (newest / name).read_bytes(), tmp_path / "out"
    for case in range(cases):
        (newest / name).write_bytes(damaged(raw, case))
        label = f"{name} case {case}"
        if case % 2:
            # Scoring loads the model; a checkpoint that is not whole is passed over.
            outcome(lambda: score(run), f"eval, {label}")
        else:
            done = outcome(lambda: export(run, out), f"export, {label}")
            assert (done is not None) == out.exists(), label
        shutil.rmtree(out, ignore_errors=True)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], label
    (newest / name).write_bytes(raw)


@pytest.mark.parametrize(
    "cases", [24, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_a_run_goes_on_from_what_is_whole(cases: int, recipe: Recipe, tmp_path: Path) -> None:
    """Damage in the newest checkpoint or the logs: it ends as it did, or says what is wrong."""
    names = [*(f"checkpoint/{name}" for name in CHECKPOINT), "metrics.jsonl", "mixture_log.jsonl"]
    for case in range(cases):
        run = tmp_path / f"run-{case}"
        shutil.copytree(recipe.run_dir, run)
        moved = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(run)})})
        (run / "resolved.yaml").write_text(yaml.safe_dump(moved.model_dump(mode="json")))
        newest = max((run / "checkpoints").iterdir())
        name = names[case % len(names)]
        file = run / name.replace("checkpoint", f"checkpoints/{newest.name}")
        file.write_bytes(damaged(file.read_bytes(), case))
        done = outcome(lambda moved=moved: train(moved, report=False), f"{name} case {case}")
        assert done is None or done["steps"] == 4, f"{name} case {case}"
        shutil.rmtree(run)
