"""Runs kept in a bucket: the same as on a disk, and they go on from the bucket alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import yaml

from raymix.errors import RecipeError, StorageError
from raymix.recipe import Recipe
from raymix.report.data.live import LiveRun
from raymix.report.data.read import read_run
from raymix.store import Corpus
from raymix.store.remote import files
from raymix.training.api import train
from raymix.training.evaluate.export import export
from raymix.training.evaluate.score import score
from raymix.training.run.heartbeat_lock import run_lock
from raymix.training.run.remote_run import newest_checkpoint_of
from raymix.training.run.rundir import RunDirectory
from tests.support import buckets
from tests.support.loops import train_corpus
from tests.support.shell import Shell, wait_for

STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where what is kept in the bucket is worked on."""
    path = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(path))
        patch.setenv("TMPDIR", str(path))
        yield path


@pytest.fixture(scope="module")
def corpus(store: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return a corpus that is on the disk, and in the bucket as `corpus`."""
    prepared = train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 9000, "b": 6000, "c": 3000})
    buckets.put(f"{store}/corpus", Path(prepared.path))
    return prepared


def document(corpus: str, run: str, **train: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return {
        "name": "run",
        "corpus": {"path": corpus},
        "data": {"sequence_length": 32, "rows_per_step": 6},
        "mixer": {
            "kind": "schedule",
            "pieces": [
                {"step": 0, "weights": {"a": 0.5, "b": 0.3, "c": 0.2}},
                {"step": 10, "weights": {"a": 0.1, "b": 0.1, "c": 0.8}},
            ],
        },
        "model": {"type": "llama", "config": {**sizes, **heads, "attention_dropout": 0.1}},
        "train": {"steps": STEPS, "lr": 0.01, "checkpoint_every": 5, **train},
        "eval": {"every": 8, "rows_per_domain": 2},
        "cluster": {"workers": 0, "gpus_per_worker": 0},
        "run": {"dir": run},
    }


def recipe(*args: str, **train: Any) -> Recipe:
    return Recipe.model_validate(document(*args, **train))


def lines_at(place: str) -> list[dict[str, Any]]:
    raw = files.read_bytes(files.join(place, "metrics.jsonl"))
    return [json.loads(line) for line in raw.splitlines()]


def step_values(place: str, *keys: str) -> list[list[Any]]:
    return [[line[key] for key in keys] for line in lines_at(place) if "loss" in line]


SAME = ("step", "batch_hash", "loss", "mixture_version", "tokens")


@pytest.fixture(scope="module")
def calm(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a run on the disk."""
    path = str(tmp_path_factory.mktemp("runs") / "run")
    train(recipe(corpus.path, path), report=False)
    return path


@pytest.fixture(scope="module")
def finished_run(corpus: Corpus, store: str) -> str:
    """Return the URL of a finished run, whose directory on this machine is gone."""
    url = f"{store}/runs/kept"
    result = train(recipe(f"{store}/corpus", url))
    assert result["run"] == url
    assert result["steps"] == STEPS
    assert not RunDirectory.at(url).path.exists()
    return url


def objects(url: str) -> dict[str, bytes]:
    """Return all that lies under a URL."""
    filesystem, path = files.locate(url)
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    names = [info.path.removeprefix(path + "/") for info in infos if info.is_file]
    return {name: files.read_bytes(files.join(url, name)) for name in names}


def test_a_run_in_a_bucket_is_that_of_a_disk(calm: str, finished_run: str) -> None:
    assert step_values(finished_run, *SAME) == step_values(calm, *SAME)
    log = "mixture_log.jsonl"
    assert files.read_bytes(f"{finished_run}/{log}") == files.read_bytes(f"{calm}/{log}")


def test_what_a_bucket_holds_of_a_run(finished_run: str, scratch: Path) -> None:
    contents = objects(finished_run)
    tops = {name.split("/")[0] for name in contents}
    assert tops == {
        *("recipe.yaml", "resolved.yaml", "environment.json", "metrics.jsonl"),
        *("mixture_log.jsonl", "controller.json", "checkpoints", "tensorboard"),
        *("report.html", "report.json"),
    }
    steps = sorted({name.split("/")[1] for name in contents if name.startswith("checkpoints/")})
    assert steps == ["step-00000020", "step-00000024"], "older ones are deleted"
    assert not [name for name in contents if name.endswith(".tmp")]
    for name, content in contents.items():
        assert buckets.SECRET.encode() not in content, f"a secret is in {name}"
        assert str(scratch).encode() not in content, f"{name} names a directory of this machine"


def test_a_finished_run_is_left_alone(corpus: Corpus, finished_run: str, store: str) -> None:
    before = objects(finished_run)
    assert train(recipe(f"{store}/corpus", finished_run), report=False)["steps"] == STEPS
    assert objects(finished_run).keys() == before.keys()


def test_commands_read_a_bucket(finished_run: str, calm: str, tmp_path: Path) -> None:
    assert read_run(finished_run).where == finished_run
    assert read_run(finished_run).name == "kept"
    watched = LiveRun(finished_run)
    watched.poll()
    assert watched.document()["state"] == "finished"
    assert watched.document()["run"] == finished_run
    there, here = score(finished_run), score(calm)
    assert there["domains"] == here["domains"]
    assert there["checkpoint"] == f"{finished_run}/checkpoints/step-00000024"
    one = score(f"{finished_run}/checkpoints/step-00000020")
    assert one["step"] == 20
    done = export(finished_run, tmp_path / "out")
    assert "model.safetensors" in done["files"]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == files.read_bytes(f"{calm}/checkpoints/step-00000024/model.safetensors")


def test_a_checkpoint_that_is_not_whole_is_passed_over(
    corpus: Corpus, finished_run: str, store: str, capsys: pytest.CaptureFixture[str], calm: str
) -> None:
    url = f"{store}/runs/cut"
    buckets.copy(finished_run, url)
    files.atomic_write_bytes(f"{url}/checkpoints/step-00000024/model.safetensors", b"short")
    newest = newest_checkpoint_of(RunDirectory.at(url))
    assert newest is not None
    assert newest[1].step == 20
    files.remove(f"{url}/checkpoints/step-00000024/state.json")
    train(recipe(f"{store}/corpus", url), report=False)
    assert f"going on from step 20 of 24 in {url}" in capsys.readouterr().out
    assert step_values(url, *SAME) == step_values(calm, *SAME)


def test_a_run_goes_back_in_a_bucket(
    corpus: Corpus, finished_run: str, store: str, calm: str
) -> None:
    url = f"{store}/runs/back"
    buckets.copy(finished_run, url)
    damaged = f"{url}/checkpoints/step-00009000/state.json"
    files.atomic_write_bytes(damaged, b"{}")
    train(recipe(f"{store}/corpus", url), from_step=23, report=False)
    assert step_values(url, *SAME) == step_values(calm, *SAME)
    aside = f"{url}/checkpoints/after-step-00000020/step-00000024"
    assert files.exists(f"{aside}/state.json")
    assert files.exists(f"{aside}/model.safetensors")
    # Neither counted nor removed.
    assert files.exists(damaged)
    assert files.list_directory(f"{url}/checkpoints")[-3:] == [
        *("step-00000020", "step-00000024", "step-00009000")
    ]


def test_what_is_there_already(corpus: Corpus, finished_run: str, store: str) -> None:
    same_recipe = recipe(f"{store}/corpus", finished_run)
    with pytest.raises(RecipeError, match="a run is here already"):
        train(same_recipe, if_exists="fail")
    with pytest.raises(RecipeError, match=r"a run of another recipe is here; .*lr: 0.01 -> 0.02"):
        train(recipe(f"{store}/corpus", finished_run, lr=0.02))
    files.atomic_write_bytes(f"{store}/runs/other/file", b"mine")
    with pytest.raises(RecipeError, match="holds files but no run"):
        train(recipe(f"{store}/corpus", f"{store}/runs/other"))


def test_a_killed_run_goes_on_from_the_bucket_alone(
    corpus: Corpus, calm: str, store: str, tmp_path: Path, scratch: Path
) -> None:
    url = f"{store}/runs/killed"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document(f"{store}/corpus", url)))
    shell = Shell(tmp_path)
    process = shell.start("train", "run.yaml", "--no-report")
    checkpoint = f"{url}/checkpoints/step-00000010/state.json"
    wait_for(lambda: files.exists(checkpoint), seconds=400, what="a checkpoint in the bucket")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert len(step_values(url, *SAME)) < STEPS, "the run was over before it could be killed"
    shutil.rmtree(scratch / f"raymix-{os.getuid()}")
    train(recipe(f"{store}/corpus", url), report=False)
    assert step_values(url, *SAME) == step_values(calm, *SAME)
    output = (tmp_path / "background.log").read_text()
    assert buckets.SECRET not in output


def test_a_run_is_worked_on_by_one_machine_at_a_time(
    finished_run: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymix.training.run.heartbeat_lock.HEARTBEAT_INTERVAL_S", 0.3)
    url = f"{store}/runs/claimed"
    buckets.copy(finished_run, url)
    said: list[str] = []
    with monkeypatch.context() as other, run_lock(RunDirectory.at(url), note=said.append):
        other.setattr(tempfile, "tempdir", str(tmp_path))  # as on another machine
        with pytest.raises(
            RecipeError, match=rf"run.dir = '{url}': in use by process {os.getpid()}"
        ):
            train(recipe(f"{store}/corpus", url), report=False)
        left = files.read_bytes(f"{url}/.lock")
    assert not files.exists(f"{url}/.lock")
    files.atomic_write_bytes(f"{url}/.lock", left)  # of one that was killed
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with run_lock(RunDirectory.at(url), note=said.append):
        pass
    assert len(said) == 1
    assert "still works on" in said[0]
    assert not files.exists(f"{url}/.lock")


def test_stores_that_cannot_be_used_are_errors_of_the_input(
    corpus: Corpus, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document(corpus.path, "s3://nowhere/run")))
    done = shell.run("train", "run.yaml")
    assert done.returncode == 2
    assert "run.dir = 's3://nowhere/run': no such bucket." in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(StorageError, match=r"^run = 's3://nowhere/run': no such bucket"):
        read_run("s3://nowhere/run")
    with pytest.raises(RecipeError, match="neither a run directory nor a checkpoint"):
        score(f"{store}/corpus")
    with pytest.raises(RecipeError, match=r"not a run directory: no metrics.jsonl"):
        read_run(f"{store}/corpus")
