"""A recipe over a small real corpus, and `raymix` as a user runs it: in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymix.training.run.rundir import read_metrics
from tests.support.forked import run_python
from tests.support.paths import QUICKSTART

DOMAINS = ("books", "python", "legal", "math")


@dataclass
class Shell:
    """Runs the command line in `cwd`, against the session's cluster where there is one."""

    cwd: Path
    address: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "raymix", *args]

    def environment(self) -> dict[str, str]:
        ray = {"RAY_ADDRESS": self.address} if self.address else {}
        return {**os.environ, **ray, **self.env}

    def run(self, *args: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return run_python(
            ["-m", "raymix", *args],
            cwd=self.cwd,
            environment=self.environment(),
            timeout=timeout,
        )

    def ok(self, *args: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        done = self.run(*args, timeout=timeout)
        assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *args: str, timeout: float = 600) -> Any:
        return json.loads(self.ok(*args, "--json", timeout=timeout).stdout)

    def start(self, *args: str) -> subprocess.Popen[str]:
        log = (self.cwd / "background.log").open("a")
        return subprocess.Popen(
            self.command(*args),
            cwd=self.cwd,
            env=self.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )


def recipe_document(**changes: Any) -> dict[str, Any]:
    """Return a recipe over four real domains whose steps take some tens of milliseconds."""
    document: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "corpus": {
            "path": "corpus",
            "tokenizer": {"train": "bpe", "vocab_size": 512, "sample_bytes": 400_000},
            "domains": [
                {
                    "name": name,
                    "train": str(QUICKSTART / "train" / f"{name}.parquet"),
                    "valid": str(QUICKSTART / "valid" / f"{name}.parquet"),
                }
                for name in DOMAINS
            ],
        },
        "data": {"sequence_length": 128, "rows_per_step": 8},
        "mixer": {"kind": "temperature", "temperature": 2},
        "model": {
            "type": "llama",
            "config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        "train": {"steps": 120, "lr": 3e-3, "checkpoint_every": 12},
        "eval": {"rows_per_domain": 4},
        "cluster": {"workers": 2},
        "run": {"dir": "runs/{name}"},
    }
    for path, value in changes.items():
        node = document
        *parents, leaf = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return document


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe_document(**changes), sort_keys=False))
    return path


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the step lines of a run's metrics, in file order."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for {what}")
        time.sleep(0.05)


def pids_titled(title: str) -> list[int]:
    """Return the processes whose title contains `title` (Ray names its workers so)."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if title in command:
                pids.append(int(entry.name))
    return sorted(pids)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


# One process for all commands: each alone spends most of its time on imports.
TYPE = """
import shlex, sys
from raymix.cli.main import app
for line in sys.stdin.read().splitlines():
    try:
        app(shlex.split(line), prog_name="raymix")
    except SystemExit as leave:
        print("exit", leave.code or 0, file=sys.stderr)
    print("=" * 9, flush=True)
    print("=" * 9, file=sys.stderr, flush=True)
"""


def typed(shell: Shell, lines: list[tuple[str, int]]) -> Iterator[tuple[str, int, str]]:
    """Yield each command line, the exit code it should have, and all that it said."""
    done = subprocess.run(
        [sys.executable, "-c", TYPE],
        input="\n".join(line for line, _ in lines),
        cwd=shell.cwd,
        env=shell.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    out, error = (text.split("=" * 9 + "\n") for text in (done.stdout, done.stderr))
    assert len(out) == len(error) == len(lines) + 1
    for at, (line, code) in enumerate(lines):
        yield line, code, out[at] + error[at]
