"""Training under Ray Train: two workers are one, also where one goes on with a run of two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from raymix.errors import ClusterLostError, CorpusError, TrainingError, UnreachableError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.launch.entry import FailFastPolicy
from raymix.training.run.rundir import RunDirectory, read_metrics
from tests.support.loops import train_corpus

STEPS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 90_000, "b": 60_000, "c": 30_000})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def recipe(corpus: Corpus, directory: Path, name: str, workers: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": name,
            "corpus": {"path": corpus.path},
            "data": {"sequence_length": 128, "rows_per_step": 9},
            "mixer": {
                "kind": "schedule",
                "pieces": [
                    {"step": 0, "weights": {"a": 0.5, "b": 0.3, "c": 0.2}},
                    {"step": 33, "weights": {"a": 0.1, "b": 0.1, "c": 0.8}},
                ],
            },
            "model": {
                "config": {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                }
            },
            "train": {"steps": STEPS, "lr": 0.003, "checkpoint_every": 10, "keep_checkpoints": 6},
            "eval": {"every": 30, "rows_per_domain": 3},
            "cluster": {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": 1},
            "run": {"dir": str(directory / "{name}"), "tensorboard": False},
        }
    )


def steps(directory: Path, name: str) -> list[dict[str, Any]]:
    lines = read_metrics(RunDirectory(directory / name).metrics)
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def two(ray_cluster: None, corpus: Corpus, directory: Path) -> list[dict[str, Any]]:
    train(recipe(corpus, directory, "two", 2), report=False)
    return steps(directory, "two")


def test_two_workers_are_one(two: list[dict[str, Any]], corpus: Corpus, directory: Path) -> None:
    document = train(recipe(corpus, directory, "none", 0), report=False)
    one = steps(directory, "none")
    assert [line["batch_hash"] for line in two] == [line["batch_hash"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-5)
    assert [line["mixture_version"] for line in two] == [0] * 33 + [1] * (STEPS - 33)
    assert document["domains"]["c"]["share_asked"] == pytest.approx((33 * 0.2 + 27 * 0.8) / 60)
    for row in document["domains"].values():
        assert row["share_realised"] == pytest.approx(row["share_asked"], abs=3 / (9 * STEPS))


def test_resumed_on_one_worker_it_reads_the_same(
    two: list[dict[str, Any]], corpus: Corpus, directory: Path
) -> None:
    run = directory / "elastic"
    shutil.copytree(directory / "two", run)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.partition("-")[2]) > STEPS // 3:
            shutil.rmtree(checkpoint)
    train(recipe(corpus, directory, "elastic", 1), report=False)
    resumed = steps(directory, "elastic")
    for key in ("step", "batch_hash", "mixture_version"):
        assert [line[key] for line in resumed] == [line[key] for line in two], key
    assert [line["loss"] for line in resumed] == pytest.approx(
        [line["loss"] for line in two], abs=1e-5
    )


def test_what_starting_again_cannot_mend_ends_a_run(tmp_path: Path) -> None:
    stop = FailFastPolicy(RunDirectory(tmp_path))
    with pytest.raises(CorpusError, match="shard"):
        stop.after_exception(None, {0: RuntimeError("gloo"), 1: CorpusError("shard x is corrupt")})


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    """A store that is away for minutes fails every attempt at the same step."""
    stop = FailFastPolicy(RunDirectory(tmp_path))
    away = ClusterLostError("blocks = [7]: they did not arrive within 300 s.")
    for _ in range(3):
        stop.after_exception(None, {0: RuntimeError("gloo"), 1: away})
    store = UnreachableError("corpus.path = 's3://b/c': the store does not answer.")
    with pytest.raises(CorpusError, match="shard"):
        stop.after_exception(None, {0: store, 1: CorpusError("shard x is corrupt")})


def test_the_same_failure_twice_ends_a_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    stop = FailFastPolicy(run)
    failure: dict[int, Exception] = {1: ValueError("no such kernel")}
    stop.after_exception(None, failure)
    run.metrics.write_text('{"step": 4, "loss": 1.0}\n')
    stop.after_exception(None, failure)  # it got further meanwhile
    with pytest.raises(TrainingError, match="twice in the same way: ValueError: no such kernel"):
        stop.after_exception(None, failure)
