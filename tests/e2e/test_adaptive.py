"""A run under PiKE that is killed ends with the mixture log of one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Shell, kill, pids_titled, steps_of, wait_for, write_recipe
from tests.e2e.test_faults import assert_same, progress, start_until

pytestmark = pytest.mark.timeout(900)

STEPS = 70
INTERVAL = 5
# Four rows of a domain are few: with larger gains the shares move although each window is rough.
PIKE = {"kind": "pike", "form": "full", "zeta_1": 0.5, "zeta_2": 0.25}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "mixture_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(shell: Shell) -> Path:
    train = {"steps": STEPS, "lr": 3e-3, "checkpoint_every": 12, "probe_interval": INTERVAL}
    write_recipe(shell.cwd / "pike.yaml", mixer=PIKE, train=train)
    shell.ok("train", "pike.yaml", "name=pike")
    return shell.cwd / "runs" / "pike"


def test_the_shares_move_once_a_window_from_the_third_on(uninterrupted: Path) -> None:
    log = log_of(uninterrupted)
    assert [entry["version"] for entry in log] == list(range(len(log)))
    first = [entry["first_step"] for entry in log]
    assert first[0] == 0
    assert set(first) <= {0, *range(2 * INTERVAL, STEPS, INTERVAL)}
    assert len(first) > 6
    assert all(sum(entry["shares"].values()) == pytest.approx(1) for entry in log)
    lines = steps_of(uninterrupted)
    assert len(lines) == STEPS
    # Each step was read under the shares that the log has for it.
    for line in lines:
        holding = [entry for entry in log if entry["first_step"] < line["step"]][-1]
        assert line["mixture_version"] == holding["version"]
        assert line["shares"] == holding["shares"]


@pytest.fixture(scope="module")
def killed(shell: Shell, uninterrupted: Path) -> Path:
    """Return a run that lost a worker, went on, and lost its driver."""
    process = start_until(shell, "pike-killed", "pike.yaml")
    run = shell.cwd / "runs" / "pike-killed"
    pids = pids_titled("ray::RayTrainWorker")
    assert pids, f"no worker at step {progress(run)}"
    kill(pids[0])
    # Past what the worker's death has undone.
    wait_for(lambda: progress(run) >= 45, seconds=200, what="step 45 after a worker's death")
    kill(process.pid)
    process.wait()
    assert progress(run) < STEPS
    return run


def gone_on(shell: Shell, killed: Path, name: str, *overrides: str) -> Path:
    run = killed.with_name(name)
    shutil.copytree(killed, run)
    shell.ok("train", "pike.yaml", f"name={name}", *overrides)
    return run


def test_killed_and_run_again_it_is_the_run_that_was_not(
    shell: Shell, uninterrupted: Path, killed: Path
) -> None:
    run = gone_on(shell, killed, "pike-again")
    assert log_of(run) == log_of(uninterrupted)
    lines, expected = steps_of(run), steps_of(uninterrupted)
    assert_same(lines, expected)
    for key in ("loss", "shares", "mixture_version"):
        assert [line[key] for line in lines] == [line[key] for line in expected]


def test_resumed_on_one_worker_the_shares_are_the_same(
    shell: Shell, uninterrupted: Path, killed: Path
) -> None:
    run = gone_on(shell, killed, "pike-elastic", "cluster.workers=1")
    log, expected = log_of(run), log_of(uninterrupted)
    assert len(steps_of(run)) == STEPS
    for key in ("version", "first_step", "mixer"):
        assert [entry[key] for entry in log] == [entry[key] for entry in expected]
    for entry, other in zip(log, expected, strict=True):
        assert entry["shares"] == pytest.approx(other["shares"], abs=1e-4)
