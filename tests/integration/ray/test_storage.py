"""Two workers and the block plane on a corpus in a bucket, the run kept there: as on a disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymix.recipe import Recipe
from raymix.store.remote import files
from raymix.training.api import train
from tests.support import buckets
from tests.support.loops import train_corpus
from tests.support.scenes import descendants
from tests.support.shell import Shell, wait_for

STEPS = 240
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def document(corpus: str, run: str, workers: int) -> dict[str, Any]:
    return {
        "name": "run",
        "corpus": {"path": corpus},
        "data": {"sequence_length": 128, "rows_per_step": 9},
        "mixer": {"kind": "static", "weights": {"a": 0.5, "b": 0.3, "c": 0.2}},
        "model": {"config": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}},
        "train": {"steps": STEPS, "lr": 0.003, "checkpoint_every": 10},
        "eval": {"every": 15, "rows_per_domain": 3},
        "cluster": {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": 0.5},
        "run": {"dir": run},
    }


def steps(place: str) -> list[dict[str, Any]]:
    raw = files.read_bytes(files.join(place, "metrics.jsonl"))
    return [line for line in map(json.loads, raw.splitlines()) if "loss" in line]


def begun(shell: Shell, run: str, step: int) -> subprocess.Popen[str]:
    """Return a run in the background that has a checkpoint of a step in the bucket."""
    process = shell.start("train", "run.yaml", "--no-report")
    wait_for(
        lambda: (
            process.poll() is not None
            or files.exists(f"{run}/checkpoints/step-{step:08d}/state.json")
        ),
        seconds=800,
        what="a checkpoint in the bucket",
    )
    assert process.poll() is None, (shell.cwd / "background.log").read_text()
    return process


@pytest.mark.timeout(1800)  # starts two clusters
def test_two_workers_on_a_bucket_killed_interrupted_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = train_corpus(tmp_path / "corpus", {"a": 90_000, "b": 60_000, "c": 30_000})
    one = str(tmp_path / "one")
    train(Recipe.model_validate(document(corpus.path, one, 0)), report=False)
    with buckets.bucket() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = f"s3://{buckets.BUCKET}"
        buckets.put(f"{store}/corpus", Path(corpus.path))
        two = f"{store}/two"
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(document(f"{store}/corpus", two, 2)))
        # A cluster of its own, whose processes have this environment; its sockets' paths are short.
        scratch, short = tmp_path / "scratch", tempfile.gettempdir()
        environment = {"TMPDIR": str(scratch), "RAY_TMPDIR": short, "RAY_ADDRESS": "local"}
        shell = Shell(tmp_path, env=environment)
        scratch.mkdir()
        process = begun(shell, two, 10)
        # The machine is gone, with all that works on it.
        for pid in (process.pid, *descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait(30)
        assert len(steps(two)) < STEPS, "the run was over before it could be killed"
        scratch.rename(tmp_path / "lost")
        scratch.mkdir()
        process = begun(shell, two, 30)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130, (tmp_path / "background.log").read_text()
        stopped_at = steps(two)[-1]["step"]
        assert 30 <= stopped_at < STEPS, "the run was over before it could be interrupted"
        assert files.exists(f"{two}/checkpoints/step-{stopped_at:08d}/state.json")
        scratch.rename(tmp_path / "given away")
        scratch.mkdir()
        # Without Ray to the end, as on a machine of its own.
        monkeypatch.setenv("TMPDIR", str(scratch))
        monkeypatch.setattr(tempfile, "tempdir", None)
        done = train(Recipe.model_validate(document(f"{store}/corpus", two, 0)), report=False)
        assert done["run"] == two
        assert done["steps"] == STEPS
        actual, wanted = steps(two), steps(one)
        for key in ("step", "batch_hash", "mixture_version", "tokens"):
            assert [line[key] for line in actual] == [line[key] for line in wanted], key
        assert [line["loss"] for line in actual] == pytest.approx(
            [line["loss"] for line in wanted], abs=1e-5
        )
        entries = files.list_directory(f"{two}/checkpoints")
        # Saved every ten steps, and where it was interrupted.
        last = max(stopped_at, STEPS - 10)
        assert [name for name in entries if name.startswith("step-")] == [
            f"step-{last:08d}",
            f"step-{STEPS:08d}",
        ]
