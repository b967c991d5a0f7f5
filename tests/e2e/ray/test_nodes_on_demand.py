"""A cluster whose head has no CPUs, and which adds nodes only for what is asked of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.shell import steps_of

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster((0,)) as running:
        yield running


def recipe(folder: Path, **cluster: Any) -> Path:
    text = "the quick brown fox jumps over the lazy dog\n" * 400
    (folder / "text.txt").write_text(text)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    document = {
        "name": "demand",
        "corpus": {
            "path": "corpus",
            "domains": [{"name": "a", "train": "text.txt", "text_unit": "line"}],
        },
        "data": {"sequence_length": 32, "rows_per_step": 4},
        "model": {"config": shape},
        "train": {"steps": 3},
        "cluster": {"gpus_per_worker": 0, **cluster},
        "run": {"dir": "run", "tensorboard": False},
    }
    path = folder / "demand.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def start(command: str, path: Path, cluster: LocalCluster) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raymix", command, path.name],
        cwd=path.parent,
        env={**os.environ, **cluster.environment, "RAY_ADDRESS": cluster.gcs},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_does_not_come_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    path = recipe(tmp_path, workers=2, wait_minutes=0)
    refused = start("train", path, cluster)
    output = refused.communicate()[0]
    assert refused.returncode == 2, output
    assert "cluster.workers = 2" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    recipe(tmp_path, workers=2, wait_minutes=0.02)
    planned = start("plan", path, cluster)
    output = " ".join(planned.communicate()[0].split())
    assert planned.returncode == 0, output
    assert "2 CPUs too few now" in output
    prepared = start("prepare", path, cluster)
    output = prepared.communicate()[0]
    assert prepared.returncode == 2, output
    assert "no CPU to prepare the corpus with" in output


def test_a_run_asks_for_its_nodes_and_starts_when_they_are_up(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = start("train", recipe(tmp_path, workers=2), cluster)
    # First for its corpus, whose preparation one CPU is enough for.
    assert cluster.wait_for_demand() == [{"CPU": 1.0}]
    cluster.add_node(1)
    while len(asked := cluster.wait_for_demand()) < 2:
        pass
    assert asked == [{"CPU": 1.0}] * 2
    cluster.add_node(1)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "nodes for 1 of 2 workers at 1 CPU each" in output
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_too_few_nodes_within_the_time(cluster: LocalCluster, tmp_path: Path) -> None:
    run = start("train", recipe(tmp_path, workers=4, wait_minutes=0.05), cluster)
    output = run.communicate()[0]
    assert run.returncode == 2, output
    said = " ".join(output.split())
    assert "the cluster's nodes can take 2 of them" in said
    assert "raise cluster.wait_minutes" in said
