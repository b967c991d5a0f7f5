"""Kill -9 each part of a run in turn: the batches and losses are those of the unkilled run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Shell, kill, pids_titled, steps_of, wait_for

# Starting Ray's workers takes minutes on a machine that is busy with other work.
pytestmark = pytest.mark.timeout(900)

STEPS = 120
KILL_AFTER = 20


@pytest.fixture(scope="module")
def uninterrupted(shell: Shell) -> list[dict[str, Any]]:
    shell.ok("train", "tiny.yaml", "name=uninterrupted")
    return steps_of(shell.cwd / "runs" / "uninterrupted")


def progress(run: Path) -> int:
    try:
        return max((line["step"] for line in steps_of(run)), default=-1)
    except (OSError, ValueError):
        return -1


def start_until(shell: Shell, name: str, recipe: str = "tiny.yaml") -> Any:
    """Start a run whose steps are slow enough to be hit, and wait until it is under way."""
    process = shell.start("train", recipe, f"name={name}")
    run = shell.cwd / "runs" / name
    wait_for(
        lambda: progress(run) >= KILL_AFTER or process.poll() is not None,
        seconds=300,
        what=f"step {KILL_AFTER} of {name}",
    )
    return process


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    assert [line["batch_hash"] for line in actual] == [line["batch_hash"] for line in expected]


def test_the_run_is_complete(uninterrupted: list[dict[str, Any]]) -> None:
    assert len(uninterrupted) == STEPS
    assert len({line["batch_hash"] for line in uninterrupted}) == STEPS


def test_driver_killed_then_same_command(shell: Shell, uninterrupted: list[dict[str, Any]]) -> None:
    process = start_until(shell, "driver")
    kill(process.pid)
    process.wait()
    shell.ok("train", "tiny.yaml", "name=driver")
    lines = steps_of(shell.cwd / "runs" / "driver")
    assert_same(lines, uninterrupted)
    assert [line["loss"] for line in lines] == [line["loss"] for line in uninterrupted]


def test_actors_killed_in_turn_and_the_run_goes_on(
    shell: Shell, uninterrupted: list[dict[str, Any]]
) -> None:
    process = start_until(shell, "actors")
    run = shell.cwd / "runs" / "actors"
    titles = ("BlockPlane", "MixtureController", "RayTrainWorker")
    for number, title in enumerate(titles):
        at = KILL_AFTER + 30 * number
        wait_for(lambda at=at: progress(run) >= at, seconds=120, what=f"step {at}")
        pids = pids_titled(f"ray::{title}")
        assert pids, f"no process titled {title} at step {progress(run)}"
        kill(pids[0])
    assert process.wait(timeout=200) == 0, (shell.cwd / "background.log").read_text()[-3000:]
    lines = steps_of(run)
    assert_same(lines, uninterrupted)
    assert [line["loss"] for line in lines] == [line["loss"] for line in uninterrupted]


def test_resumed_on_one_worker_reads_the_same(
    shell: Shell, uninterrupted: list[dict[str, Any]]
) -> None:
    process = start_until(shell, "elastic")
    kill(process.pid)
    process.wait()
    shell.ok("train", "tiny.yaml", "name=elastic", "cluster.workers=1")
    lines = steps_of(shell.cwd / "runs" / "elastic")
    assert_same(lines, uninterrupted)
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in uninterrupted], abs=1e-5
    )


def test_a_finished_run_is_left_alone(shell: Shell, uninterrupted: list[dict[str, Any]]) -> None:
    before = (shell.cwd / "runs" / "uninterrupted" / "metrics.jsonl").read_bytes()
    shell.ok("train", "tiny.yaml", "name=uninterrupted")
    assert (shell.cwd / "runs" / "uninterrupted" / "metrics.jsonl").read_bytes() == before


def test_changed_corpus_is_refused(shell: Shell, uninterrupted: list[dict[str, Any]]) -> None:
    runs = shell.cwd / "runs"
    shutil.copytree(runs / "uninterrupted", runs / "moved")
    shutil.copytree(shell.cwd / "corpus", shell.cwd / "corpus-changed")
    manifest = shell.cwd / "corpus-changed" / "manifest.json"
    text = manifest.read_text()
    fingerprint = text.split('"fingerprint": "', 1)[1].split('"', 1)[0]
    manifest.write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    done = shell.run("train", "tiny.yaml", "name=moved", "corpus.path=corpus-changed")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
