"""Ctrl-C: a clean stop with a checkpoint, exit code 130, and the same batches after."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.shell import Shell, steps_of, wait_for

FEW = ("train.steps=60", "train.checkpoint_every=1000", "cluster.workers=0")


def test_ctrl_c_then_the_same_command_goes_on(shell: Shell) -> None:
    shell.ok("train", "tiny.yaml", "name=calm", *FEW)
    run = shell.cwd / "runs" / "stopped"
    process = start_and_step(shell, run)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=180) == 130
    stopped_at = steps_of(run)[-1]["step"]
    assert stopped_at < 60, "the run was over before it could be stopped"
    assert list((run / "checkpoints").glob("step-*")), "no checkpoint although the stop was clean"
    log = (shell.cwd / "background.log").read_text()
    assert "Traceback" not in log
    # Then the terminal is closed under it.
    assert hang_up(shell, run, stopped_at + 10, "train", "tiny.yaml", "name=stopped", *FEW) == 130
    hung_up_at = steps_of(run)[-1]["step"]
    assert stopped_at + 10 <= hung_up_at < 60, "the run was over before its terminal was closed"
    assert (run / "checkpoints" / f"step-{hung_up_at:08d}" / "state.json").is_file()
    shell.ok("train", "tiny.yaml", "name=stopped", *FEW)
    calm, resumed = steps_of(shell.cwd / "runs" / "calm"), steps_of(run)
    assert [line["batch_hash"] for line in resumed] == [line["batch_hash"] for line in calm]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in calm]


def start_and_step(shell: Shell, run: Path) -> subprocess.Popen[str]:
    """Start a run in the background and return its process after some steps."""
    process = shell.start("train", "tiny.yaml", f"name={run.name}", *FEW)
    metrics = run / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 8,
        seconds=300,
        what="the first steps",
    )
    return process


def test_the_second_ctrl_c_does_not_wait(shell: Shell) -> None:
    process = start_and_step(shell, shell.cwd / "runs" / "abandoned")
    # The interpreter would abort: a thread of the training is inside torch.
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    log = (shell.cwd / "background.log").read_text()
    assert "error: interrupted" in log
    assert "terminate called" not in log


def hang_up(shell: Shell, run: Path, step: int, *args: str) -> int:
    """Run a command on a terminal that is closed after a step; return its exit code."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(shell.cwd)
        os.execvpe(sys.executable, shell.command(*args), shell.environment())
    # Read meanwhile: a terminal that nobody reads blocks who writes to it.
    reader = threading.Thread(target=_read_all, args=(terminal,), daemon=True)
    reader.start()
    wait_for(lambda: steps_of(run)[-1]["step"] >= step, seconds=300, what="steps on the terminal")
    # The shell sends one, and the kernel another when the terminal is gone.
    os.kill(process, signal.SIGHUP)
    time.sleep(0.02)
    os.kill(process, signal.SIGHUP)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


@pytest.mark.parametrize("command", ["train", "eval"])
def test_json_failures_are_documents_too(command: str, shell: Shell) -> None:
    import json

    done = shell.run(command, "nowhere.yaml", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"]


def test_ctrl_c_inside_executed_text_ends_with_130_too(shell: Shell) -> None:
    # CPython notes a KeyboardInterrupt that leaves an exec of text, and would end by the signal.
    (shell.cwd / "interrupted.py").write_text('exec("raise KeyboardInterrupt")\n')
    done = shell.run("train", "tiny.yaml", "train.optimizer=interrupted:Adam", *FEW)
    assert done.returncode == 130
    assert "error: interrupted" in done.stderr
