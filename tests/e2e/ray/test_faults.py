"""Kill -9 each part of a run in turn: batches, losses and mixture log are as if it had not been.

The run that is killed is under PiKE, so that what must survive is more than a place in a corpus:
the mixer's state, half a window's losses, and the shares that are to come.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.shell import Shell, kill, pids_titled, steps_of, wait_for, write_recipe

# Starting Ray's workers takes minutes on a machine that is busy with other work.
pytestmark = pytest.mark.timeout(1800)

STEPS = 110
KILL_AFTER, KILL_EVERY = 20, 20
ACTORS = ("BlockPlane", "MixtureController", "RayTrainWorker")
INTERVAL = 5
# Four rows of a domain are few: with larger gains the shares move although each window is rough.
PIKE = {"kind": "pike", "form": "full", "zeta_1": 0.5, "zeta_2": 0.25}


def progress(run: Path) -> int:
    try:
        return max((line["step"] for line in steps_of(run)), default=-1)
    except (OSError, ValueError):
        return -1


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "mixture_log.jsonl").read_text().splitlines()]


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]], *keys: str) -> None:
    for key in ("step", "batch_hash", *keys):
        assert [line[key] for line in actual] == [line[key] for line in expected], key


def gone_on(shell: Shell, killed: Path, name: str, *overrides: str) -> Path:
    """Return a copy of a killed run, brought to its end by its own command."""
    run = killed.with_name(name)
    shutil.copytree(killed, run)
    shell.ok("train", "pike.yaml", f"name={name}", *overrides)
    return run


@pytest.fixture(scope="module")
def pike(shell: Shell) -> Path:
    """Return a run under PiKE that nothing happened to."""
    train = {"steps": STEPS, "lr": 3e-3, "checkpoint_every": 12, "probe_interval": INTERVAL}
    write_recipe(shell.cwd / "pike.yaml", mixer=PIKE, train=train)
    shell.ok("train", "pike.yaml", "name=pike")
    return shell.cwd / "runs" / "pike"


@pytest.fixture(scope="module")
def killed(shell: Shell, pike: Path) -> Path:
    """Return a run that lost plane, controller and a worker, went on, and lost its driver."""
    process = shell.start("train", "pike.yaml", "name=pike-killed")
    run = pike.with_name("pike-killed")
    for number, title in enumerate(ACTORS):
        at = KILL_AFTER + KILL_EVERY * number
        wait_for(
            lambda at=at: progress(run) >= at or process.poll() is not None,
            seconds=600,
            what=f"step {at}",
        )
        pids = pids_titled(f"ray::{title}")
        assert pids, f"no process titled {title} at step {progress(run)}"
        kill(pids[0])
    # Past what the worker's death has undone.
    at = KILL_AFTER + KILL_EVERY * len(ACTORS)
    wait_for(lambda: progress(run) >= at, seconds=500, what=f"step {at} after a worker's death")
    kill(process.pid)
    process.wait()
    # Its workers are ended by Ray, and may remove an old checkpoint until they are.
    wait_for(lambda: not pids_titled("ray::RayTrainWorker"), seconds=60, what="the workers' end")
    assert progress(run) < STEPS, (shell.cwd / "background.log").read_text()[-3000:]
    return run


def test_the_shares_move_once_a_window_from_the_third_on(pike: Path) -> None:
    log = log_of(pike)
    assert [entry["version"] for entry in log] == list(range(len(log)))
    first = [entry["first_step"] for entry in log]
    assert first[0] == 0
    assert set(first) <= {0, *range(2 * INTERVAL, STEPS, INTERVAL)}
    assert len(first) > 6
    assert all(sum(entry["shares"].values()) == pytest.approx(1) for entry in log)
    lines = steps_of(pike)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({line["batch_hash"] for line in lines}) == STEPS
    # Each step was read under the shares that the log has for it.
    for line in lines:
        holding = [entry for entry in log if entry["first_step"] < line["step"]][-1]
        assert line["mixture_version"] == holding["version"]
        assert line["shares"] == holding["shares"]


def test_killed_and_run_again_it_is_the_run_that_was_not(
    shell: Shell, pike: Path, killed: Path
) -> None:
    run = gone_on(shell, killed, "pike-again")
    assert log_of(run) == log_of(pike)
    assert_same(steps_of(run), steps_of(pike), "loss", "grad_norm", "shares", "mixture_version")
    said = (shell.cwd / "background.log").read_text()
    assert "restarted" in said
    assert "Traceback" not in said
    assert "(raylet)" not in said


def test_resumed_in_one_process_the_shares_are_the_same(
    shell: Shell, pike: Path, killed: Path
) -> None:
    run = gone_on(shell, killed, "pike-elastic", "cluster.workers=0")
    log, expected = log_of(run), log_of(pike)
    assert len(steps_of(run)) == STEPS
    for key in ("version", "first_step", "mixer"):
        assert [entry[key] for entry in log] == [entry[key] for entry in expected]
    for entry, other in zip(log, expected, strict=True):
        assert entry["shares"] == pytest.approx(other["shares"], abs=1e-4)


def test_corrupt_shard_names_file_and_block(shell: Shell) -> None:
    corpus = shell.cwd / "corpus-corrupt"
    shutil.copytree(shell.cwd / "corpus", corpus)
    shard = next((corpus / "books" / "train").glob("shard-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[200 : len(data) // 2] = b"\xff" * (len(data) // 2 - 200)
    shard.write_bytes(data)
    done = shell.run(
        "train", "tiny.yaml", "name=corrupt", "corpus.path=corpus-corrupt", "cluster.workers=1"
    )
    assert done.returncode == 2, done.stderr
    assert "shard-00000.arrow" in done.stderr
    assert "block" in done.stderr
    assert "Traceback" not in done.stderr
