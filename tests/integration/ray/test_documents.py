"""Fine-tuning on real books and mail: two workers that share long documents learn what one does."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raymix.recipe import DocumentData, Recipe
from raymix.schedule import plan_batch
from raymix.store import Corpus
from raymix.training.api import train
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.training.step.document_layout import scheduling_config
from tests.support.shell import wait_for

STEPS = 20
LONGEST = 1536


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def recipe(directory: Path, shared_data: Path, name: str, workers: int) -> Recipe:
    source = shared_data / "corpus_small"
    return Recipe.model_validate(
        {
            "name": name,
            "corpus": {
                "path": str(directory / "corpus"),
                "tokenizer": {"kind": "byte"},
                "domains": [
                    {
                        "name": domain,
                        "train": str(source / "train" / f"{domain}.parquet"),
                        "valid": str(source / "valid" / f"{domain}.parquet"),
                    }
                    for domain in ("books", "email")
                ],
            },
            "data": {
                "mode": "documents",
                "sequence_length": LONGEST,
                "tokens_per_step": 3072,
                "assign": {"context": max(1, workers)},
            },
            "mixer": {"kind": "static", "weights": {"books": 0.4, "email": 0.6}},
            "model": {
                "config": {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                }
            },
            # So little room on a worker that a book must be shared.
            "train": {
                "steps": STEPS,
                "lr": 0.003,
                "micro_batch_rows": 1,
                "checkpoint_every": 5,
                "keep_checkpoints": 4,
            },
            "eval": {"rows_per_domain": 2},
            "cluster": {"workers": workers, "gpus_per_worker": 0},
            "run": {"dir": str(directory / "{name}"), "tensorboard": False},
        }
    )


def steps(directory: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(RunDirectory(directory / name).metrics) if "loss" in line]


def planner_pid() -> int:
    """Return the process of the actor that plans ranks."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("raymix-sequences-"):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            pid: int = ray.get(handle.status.remote(), timeout=200)["pid"]
            return pid
    raise LookupError("no sequence scheduler")


@pytest.fixture(scope="module")
def two(ray_cluster: None, directory: Path, shared_data: Path) -> list[dict[str, Any]]:
    """Train with two workers; the actor that plans for them is killed on the way."""
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: len(steps(directory, "two")) >= 6, seconds=600, what="step 6")
        killed.append(planner_pid())
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    train(recipe(directory, shared_data, "two", 2), report=False)
    thread.join()
    assert killed
    return steps(directory, "two")


def test_two_workers_that_share_documents_learn_what_one_does(
    two: list[dict[str, Any]], directory: Path, shared_data: Path
) -> None:
    train(recipe(directory, shared_data, "one", 0), report=False)
    one = steps(directory, "one")
    for key in ("batch_hash", "counts"):
        assert [line[key] for line in two] == [line[key] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-5)
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    evals = [
        [line["eval"] for line in read_metrics(RunDirectory(directory / name).metrics)
         if "eval" in line]
        for name in ("one", "two")
    ]  # fmt: skip
    for alone, together in zip(*evals, strict=True):
        for domain, row in alone.items():
            assert together[domain]["loss"] == pytest.approx(row["loss"], abs=1e-5)


def test_some_of_these_documents_are_shared_and_some_are_not(
    two: list[dict[str, Any]], directory: Path, shared_data: Path
) -> None:
    used = recipe(directory, shared_data, "two", 2)
    assert isinstance(used.data, DocumentData)
    corpus = Corpus.open(str(directory / "corpus"))
    model = build_model(used.model, CorpusFacts(257, 256, LONGEST), seed=1)
    how = scheduling_config(used, used.data, model, rows=1, on_gpu=False)
    lengths = np.concatenate(
        [corpus.document_lengths(name, "train") for name in ("books", "email")]
    )
    schedule = plan_batch(np.minimum(lengths, LONGEST).astype(np.int64), how.layout, how.cost)
    widths = Counter(schedule.placement.width_K.tolist())
    assert widths[1] > 100
    assert widths[2] > 100
    assert schedule.memory_R.max() <= LONGEST // 2


def test_one_worker_goes_on_where_two_were(
    two: list[dict[str, Any]], directory: Path, shared_data: Path
) -> None:
    run = directory / "elastic"
    shutil.copytree(directory / "two", run)
    for number in (15, STEPS):
        shutil.rmtree(run / "checkpoints" / f"step-{number:08d}")
    train(recipe(directory, shared_data, "elastic", 0), report=False)
    resumed = steps(directory, "elastic")
    assert [line["batch_hash"] for line in resumed] == [line["batch_hash"] for line in two]
    assert [line["loss"] for line in resumed] == pytest.approx(
        [line["loss"] for line in two], abs=1e-5
    )
