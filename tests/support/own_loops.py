"""Runs a training script of the docs as its user would, and notes every step that it trains.

`python -m tests.support.own_loops SCRIPT NOTES`: each trained step is a line of NOTES, its number
and its batch's hash. With `--weights` the shares are changed after a step, and with `--kill-at` the
process is killed at once after so many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def scripts(page: Path) -> dict[str, str]:
    """Return the Python blocks of a page by the heading that they stand below."""
    script_of = {}
    for section in page.read_text().split("\n## ")[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            script_of[section.splitlines()[0]] = blocks[0]
    return script_of


def run(
    script: Path,
    notes: Path,
    *,
    ranks: int = 1,
    kill_at: int | None = None,
    weights_at: tuple[int, Mapping[str, float]] | None = None,
) -> list[tuple[int, str]]:
    """Return the steps that rank 0 of a script trained, with their hashes.

    Args:
        script: The script.
        notes: File for the steps.
        ranks: Processes, as torchrun starts them.
        kill_at: Step after which all are killed.
        weights_at: Step after which the shares of the domains are changed, and the new ones.
    """
    command = [sys.executable, "-m", "tests.support.own_loops", str(script), str(notes)]
    command += [] if kill_at is None else ["--kill-at", str(kill_at)]
    command += [] if weights_at is None else ["--weights", json.dumps(weights_at)]
    processes = [
        subprocess.Popen(
            command,
            cwd=script.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(_variables(rank, ranks))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert [process.returncode for process in processes] == [expected] * ranks, outputs[0][-3000:]
    return read(notes)


def read(notes: Path) -> list[tuple[int, str]]:
    """Return the steps noted, and begin anew."""
    lines = [line.split() for line in notes.read_text().splitlines()]
    notes.unlink()
    return [(int(step), batch_hash) for step, batch_hash in lines]


def _variables(rank: int, ranks: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "none",
        # One port per test process: tests run side by side.
        "MASTER_PORT": str(29_500 + os.getpid() % 5_000),
    }


def note_steps(notes: Path, kill_at: int | None, weights_at: Sequence[Any] | None) -> None:
    """Make every `MixtureLoader.step` of this process write a line, and do what `run` says."""
    from raymix.loader import MixtureLoader

    report = MixtureLoader.step

    def step(loader: MixtureLoader) -> None:
        report(loader)
        trained = loader.step_trained
        if loader.rank == 0:
            with notes.open("a") as file:
                file.write(f"{trained} {loader.info(trained - 1).batch_hash}\n")
        if weights_at is not None and trained == weights_at[0]:
            loader.set_weights(weights_at[1])
        if trained == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    MixtureLoader.step = step


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("script")
    parser.add_argument("notes", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--weights", type=json.loads)
    args = parser.parse_args()
    torch.set_num_threads(1)
    note_steps(args.notes, args.kill_at, args.weights)
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
