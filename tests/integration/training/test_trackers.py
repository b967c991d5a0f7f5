"""Experiment trackers: the real libraries read back what a run and its continuation sent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymix.errors import RecipeError
from raymix.recipe import Recipe, load_recipe, recipe_to_yaml
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.plan.preflight import plan_run
from raymix.training.run.trackers import TrackedRun
from tests.integration.training.test_run import STEPS, recipe
from tests.support.loops import train_corpus
from tests.support.paths import ROOT

LIBRARIES = Path(os.environ.get("RAYMIX_TRACKERS", ROOT / ".venv-trackers"))
HERE = "tests.integration.training.test_trackers"
# What the library's own reader finds after a run, as {name: {step: value}}.
SCRIPTS = {
    # Offline files are logs in LevelDB's format: blocks of 32 KiB of (crc, length, type, data).
    "wandb": """
from wandb.proto import wandb_internal_pb2 as pb
series, ids = {}, set()
for file in sorted(Path("run").rglob("run-*.wandb")):
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            read, record = pb.Record.FromString(record), b""
            if read.WhichOneof("record_type") == "run":
                ids.add(read.run.run_id)
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json)
                     for item in read.history.item}
            for name in items.keys() & WANTED:
                series.setdefault(name, {})[items["step"]] = items[name]
assert len(ids) == 1, ids
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("mixing").experiment_id])
assert run.info.status == "FINISHED" and run.data.params["data.sequence_length"] == "32"
series = {n: {m.step: m.value for m in client.get_metric_history(run.info.run_id, n)}
          for n in WANTED}
""",
    "trackio": """
import glob, os, sqlite3
(file,) = glob.glob(os.environ["TRACKIO_DIR"] + "/*.db")
series = {}
rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics").fetchall()
assert len({name for name, _, _ in rows}) == 1
for _, step, metrics in rows:
    for name in json.loads(metrics).keys() & WANTED:
        series.setdefault(name, {})[step] = json.loads(metrics)[name]
""",
}
OPTIONS = {
    "wandb": {"mode": "offline"},
    "mlflow": {"tracking_uri": "sqlite:///mlflow.db", "experiment": "mixing"},
    "trackio": {},
}
# Stops after four steps and goes on, as after Ctrl-C. The libraries come last on the path: they
# bring some of ours in other versions.
TRAIN = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import raymix.training.run.recorder as module
from raymix.training.api import train
module._TRACKERS_INTERVAL_S = 0.0
WANTED = {"train/loss", "eval/a"}
step = module.Recorder.step

def stopping(recorder, line):
    step(recorder, line)
    if line["step"] == 4:
        Path("run/.stop").touch()

module.Recorder.step = stopping
try:
    train("my.yaml", report=False)
except KeyboardInterrupt:
    module.Recorder.step = step
    train("my.yaml", report=False)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})


class Note:
    """A tracker of one's own: appends lines to a file of the run directory."""

    def __init__(self, run: TrackedRun, *, file: str, fail_at: int | None = None) -> None:
        self._path, self._fail_at = run.directory / file, fail_at
        self._write({"id": run.id, "name": run.name, "start": run.start_step})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._fail_at:
            raise ConnectionError("the server is down")
        self._write({"step": step, **values})

    def close(self) -> None:
        self._write({"closed": True})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses_of_a(metrics: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["eval"]["a"]["loss"] for line in metrics if "eval" in line}


def tracked(corpus: Corpus, tmp_path: Path, name: str, **options: Any) -> Recipe:
    own = recipe(corpus, tmp_path)
    run = {"dir": own.run.dir, "trackers": [name], "tracker_options": {name: options}}
    return Recipe.model_validate({**own.model_dump(mode="json", exclude_unset=True), "run": run})


def test_one_of_ones_own_gets_every_scalar_and_one_id(corpus: Corpus, tmp_path: Path) -> None:
    own = tracked(corpus, tmp_path, f"{HERE}:Note", file="notes")
    train(own, report=False)
    run = Path(own.run_dir)
    lines = lines_of(run / "notes")
    about = json.loads((run / "environment.json").read_text())
    assert lines[0] == {"id": about["tracking_id"], "name": run.name, "start": 0}
    assert lines[-1] == {"closed": True}
    evaluated = {line["step"]: line["eval/a"] for line in lines if "eval/a" in line}
    metrics = lines_of(run / "metrics.jsonl")
    assert evaluated == losses_of_a(metrics)
    sent = {line["step"]: line for line in lines if "train/loss" in line}
    for line in metrics:
        if "loss" in line and line["step"] in sent:
            assert sent[line["step"]]["train/loss"] == line["loss"]
            assert sent[line["step"]]["shares/a"] == line["shares"]["a"]
    assert 1 in sent


def test_a_fault_of_one_ends_it_and_not_the_run(corpus: Corpus, tmp_path: Path) -> None:
    own = tracked(corpus, tmp_path, f"{HERE}:Note", file="notes", fail_at=4)
    train(own, report=False)
    run = Path(own.run_dir)
    said = (run / "trackers.log").read_text()
    assert said == f"{HERE}:Note ends here: ConnectionError: the server is down\n"
    assert max(line.get("step", 0) for line in lines_of(run / "notes")) < 4
    assert lines_of(run / "metrics.jsonl")[-1]["step"] == STEPS


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{HERE}:Nothing", r"run\.trackers\.0 = '.*:Nothing': it cannot be imported.*Nothing"),
        ("nowhere.at.all:Note", r"run\.trackers\.0.*cannot be imported: No module named 'nowhere'"),
        *(
            (library, rf"run\.trackers\.0 = '{library}': not installed.*raymix\[{library}\]")
            for library in SCRIPTS
            if importlib.util.find_spec(library) is None
        ),
    ],
)
def test_a_plan_refuses_what_cannot_be_imported(
    corpus: Corpus, tmp_path: Path, name: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        plan_run(tracked(corpus, tmp_path, name))


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"trackers": ["wandbb"]}, r"run\.trackers\.0 = 'wandbb'.*wandb"),
        ({"trackers": ["mlflow", "mlflow"]}, r"run\.trackers\.1 = 'mlflow': it is there twice"),
        ({"tracker_options": {"wandb": {}}}, r"run\.tracker_options\.wandb.*no such tracker"),
    ],
)
def test_wrong_names_are_refused(
    corpus: Corpus, tmp_path: Path, run: dict[str, Any], says: str
) -> None:
    document = yaml.safe_load(recipe_to_yaml(recipe(corpus, tmp_path)))
    with pytest.raises(RecipeError, match=says):
        load_recipe(document | {"run": run})


@pytest.mark.skipif(
    not LIBRARIES.is_dir(),
    reason="trackers are not installed: `make .venv-trackers`, or set RAYMIX_TRACKERS",
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_and_its_continuation_are_one_record(
    corpus: Corpus, tmp_path: Path, name: str
) -> None:
    own = tracked(corpus, tmp_path, name, **OPTIONS[name])
    (tmp_path / "my.yaml").write_text(recipe_to_yaml(own))
    script = TRAIN + SCRIPTS[name] + "\nprint('series ' + json.dumps(series))\n"
    done = subprocess.run(
        [sys.executable, "-c", script, str(LIBRARIES)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("series "))
    series = json.loads(line.removeprefix("series "))
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    losses = {str(line["step"]): line["loss"] for line in metrics if "loss" in line}
    assert series["train/loss"] == pytest.approx(losses)
    evaluated = {str(step): loss for step, loss in losses_of_a(metrics).items()}
    assert series["eval/a"] == pytest.approx(evaluated)
    assert not (tmp_path / "run" / "trackers.log").exists()
