"""`make gpu-day`: on a CPU the dry run goes the whole way, and takes up where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

PARTS = ["tests", "loop", "signals", "calibrate", "longctx", "compile"]


def gpu_day(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu_day", "--out", str(directory), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_dry_run_goes_the_whole_way(tmp_path: Path) -> None:
    done = gpu_day(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    states = [json.loads((tmp_path / f"{part}-state.json").read_text()) for part in PARTS]
    assert [state["exit"] for state in states] == [0] * len(PARTS)
    page = (tmp_path / "gpu-day.md").read_text()
    assert "figures mean nothing" in page
    assert [f"## {part}" in page for part in PARTS] == [False, True, True, False, True, True]
    # Results in a working copy with changes are made again; else only what failed is.
    if not states[0]["modified"]:
        (tmp_path / "tests-state.json").write_text(json.dumps(states[0] | {"exit": 1}))
        again = gpu_day(tmp_path, "--dry-run")
        assert [f"{part}: done before" in again.stdout for part in PARTS] == [False] + 5 * [True]
        assert again.returncode == 0


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    done = gpu_day(tmp_path, "--dry-run", "--only", "tests", "--seconds", "10")
    assert done.returncode == 1
    assert "tests: not begun, 10 s are left of its 300" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = gpu_day(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no CUDA device. --dry-run goes the whole way on a CPU.\n"
