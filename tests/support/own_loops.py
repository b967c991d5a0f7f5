"""Runs a training script of the docs as its user would, and notes every step that it trains.

`python -m tests.support.own_loops SCRIPT NOTES [KILL_AT]`: each trained step is a line of NOTES,
its number and its batch's hash. With KILL_AT the process is killed at once after so many steps.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

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
    script: Path, notes: Path, *, kill_at: int | None = None, ranks: int = 1
) -> list[tuple[int, str]]:
    """Return the steps that rank 0 of a script trained, with their hashes."""
    command = [sys.executable, "-m", "tests.support.own_loops", str(script), str(notes)]
    command += [] if kill_at is None else [str(kill_at)]
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
        # One port per test process: tests run side by side.
        "MASTER_PORT": str(29_500 + os.getpid() % 5_000),
    }


def note_steps(notes: Path, kill_at: int | None) -> None:
    """Make every `MixtureLoader.step` of this process write a line."""
    from raymix.loader import MixtureLoader

    report = MixtureLoader.step

    def step(loader: MixtureLoader) -> None:
        report(loader)
        trained = loader.step_trained
        if loader.rank == 0:
            with notes.open("a") as file:
                file.write(f"{trained} {loader.info(trained - 1).batch_hash}\n")
        if trained == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    MixtureLoader.step = step


def main() -> None:
    import torch

    torch.set_num_threads(1)
    script, notes, *kill_at = sys.argv[1:]
    note_steps(Path(notes), int(kill_at[0]) if kill_at else None)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
