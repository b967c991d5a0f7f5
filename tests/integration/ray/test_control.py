"""Shares changed while two workers on Ray train: the controller's actor reads the request files."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import raymix
from raymix.errors import RecipeError
from raymix.recipe import Recipe
from raymix.training.run.rundir import RunDirectory, read_metrics
from tests.support.loops import train_corpus

STEPS = 250
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}
OTHER = {"a": 0.1, "b": 0.1, "c": 0.8}


def recipe(corpus_path: str, directory: Path) -> Recipe:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Recipe.model_validate(
        {
            "name": "run",
            "corpus": {"path": corpus_path},
            "data": {"sequence_length": 64, "rows_per_step": 10},
            "mixer": {"kind": "static", "weights": SHARES},
            "model": {"config": sizes | heads},
            "train": {"steps": STEPS},
            "eval": {"rows_per_domain": 1},
            "cluster": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1},
            "run": {"dir": str(directory / "{name}"), "tensorboard": False},
        }
    )


def steps(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if "loss" in line]


def test_all_workers_take_up_a_request_at_one_step(ray_cluster: None, tmp_path: Path) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 90_000, "b": 60_000, "c": 30_000})
    run = RunDirectory(tmp_path / "run")
    used = recipe(corpus.path, tmp_path)
    training = threading.Thread(target=raymix.train, args=[used], kwargs={"report": False})
    training.start()
    while training.is_alive() and len(steps(run)) < 3:
        time.sleep(0.05)
    control = raymix.connect(run.path)
    with pytest.raises(RecipeError, match="the corpus has no such domain"):
        control.set_weights({"boks": 1.0})
    before = len(steps(run))
    first = control.set_weights(OTHER)["first_step"]
    # Leases cover 0.05 s, so that is near where the metrics are.
    assert before <= first < STEPS
    back = control.release(first + 20)["first_step"]
    document = control.weights()
    assert document["in_work"]
    training.join()
    lines = steps(run)
    assert len(lines) == STEPS
    expected = [SHARES] * first + [pytest.approx(OTHER)] * (back - first)
    assert [line["shares"] for line in lines] == expected + [SHARES] * (STEPS - back)
    rows = sum(line["counts"].get("c", 0) for line in lines[first:back]) / 64
    assert rows == pytest.approx(10 * 0.8 * (back - first), abs=3)
