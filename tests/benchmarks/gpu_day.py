"""Everything that needs a GPU, in at most 25 minutes of one: `make gpu-day`.

    python -m tests.benchmarks.gpu_day [--dry-run] [--out DIRECTORY] [--only PART ...]
                                       [--again] [--seconds 1500]

The parts run in the order of their worth, each as a command of its own with a time limit, and leave
their output, their table and their state in files of their own. The same command again goes on with
the parts that have not succeeded at this commit. Nothing needs Ray, so a machine with torch and the
other dependencies of raymix runs the module without `make`. `gpu-day.md` collects all
tables. `--dry-run` goes the whole way on a CPU, with tiny sizes: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.benchmarks._report import COLUMNS, RESULTS, environment
from tests.benchmarks.loop import GPU
from tests.support.paths import ROOT

RECIPE, COST = "model.yaml", "calibrate.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One command."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python."""
    gpu: tuple[str, ...]
    """Further ones on a GPU."""
    dry: tuple[str, ...]
    """Further ones in a dry run."""
    limit_s: float
    table: str | None = None
    """The file of its table, below the directory of results."""


def parts(directory: Path) -> tuple[Part, ...]:
    """Return the parts, in the order of their worth."""
    recipe, cost = str(directory / RECIPE), str(directory / COST)
    calibrate = ("-m", "raymix", "schedule", "calibrate", recipe, "--out", cost, "--ranks", "1")
    return (
        Part("tests", ("-m", "pytest", "-q", "tests/gpu"), (), (), 300),
        Part(
            "loop",
            ("-m", "tests.benchmarks.loop", "--workers", "0"),
            (),
            ("--quick",),
            300,
            "loop.json",
        ),
        Part(
            "signals",
            ("-m", "tests.benchmarks.signals"),
            ("--device", "cuda", "--groups", "8", "32", "128"),
            ("--device", "cpu", "--groups", "2", "--repeats", "1"),
            300,
            "signals.json",
        ),
        Part(
            "calibrate",
            calibrate,
            ("--device", "cuda", "--seconds", "60"),
            ("--device", "cpu", "--seconds", "1"),
            150,
        ),
        Part(
            "longctx",
            ("-m", "tests.benchmarks.longctx", "--cost", cost),
            (),
            ("--quick",),
            240,
            "longctx.json",
        ),
        Part(
            "compile",
            ("-m", "tests.benchmarks.compile"),
            (),
            ("--steps", "7", "--repeats", "1"),
            200,
            "compile.json",
        ),
    )


def run(part: Part, directory: Path, *, dry: bool) -> dict[str, Any]:
    """Run a part, and return its state after writing that to its file."""
    command = [sys.executable, *part.command, *(part.dry if dry else part.gpu)]
    log = directory / f"{part.name}.log"
    # A dry run is one on a CPU, whatever the machine has.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if dry else {}
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **hidden, "RAYMIX_BENCH_RESULTS": str(directory)},
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that a part that hangs ends with all its processes.
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            code = f"killed after {part.limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    state = {
        "part": part.name,
        "exit": code,
        "seconds": round(time.monotonic() - began, 1),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command[1:],
        **_identity(dry=dry),
    }
    _state_file(part, directory).write_text(json.dumps(state, indent=2) + "\n")
    return state


def _identity(*, dry: bool) -> dict[str, Any]:
    """Return the state of the code and the device that a result belongs to."""
    here = environment()
    return {"dry": dry, **{name: here[name] for name in ("commit", "modified", "gpu")}}


def _state_file(part: Part, directory: Path) -> Path:
    return directory / f"{part.name}-state.json"


def finished(part: Part, directory: Path, *, dry: bool) -> dict[str, Any] | None:
    """Return the state of a part that has succeeded on this code and device."""
    try:
        state = json.loads(_state_file(part, directory).read_text())
    except (OSError, ValueError):
        return None
    identity = _identity(dry=dry)
    same = all(state.get(name) == value for name, value in identity.items())
    # What changed since the commit is unknown, so such a result is never reused.
    return state if same and state["exit"] == 0 and not identity["modified"] else None


def write_summary(states: Sequence[dict[str, Any]], directory: Path, *, dry: bool) -> Path:
    """Write all tables into one page and return its path."""
    here = environment()
    lines = [
        "# gpu-day: `make gpu-day`" + " (a dry run on a CPU: figures mean nothing)" * dry,
        "",
        f"Commit {here['commit']}, {here['date']}. {here['gpu'] or 'no GPU'}; {here['cores']} "
        f"cores ({here['cpu']}), Python {here['python']}; "
        + ", ".join(f"{name} {version}" for name, version in here["versions"].items())
        + ".",
        "",
        "| part | exit | seconds |",
        "|---|---|---|",
        *(f"| {state['part']} | {state['exit']} | {state['seconds']} |" for state in states),
    ]
    tables = {part.name: part.table for part in parts(directory)}
    for state in states:
        table = tables[state["part"]]
        if table is not None and state["exit"] == 0:
            rows = json.loads((directory / table).read_text())["rows"]
            lines += ["", f"## {state['part']}", "", "| " + " | ".join(COLUMNS) + " |"]
            lines += ["|---" * len(COLUMNS) + "|", *(_cells(each) for each in rows)]
    path = directory / "gpu-day.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _cells(item: dict[str, Any]) -> str:
    spread = item["spread"]
    ends = "" if spread is None else f"{spread[0]:.3g} to {spread[1]:.3g}"
    cells = {name: "" if item[name] is None else item[name] for name in COLUMNS} | {"spread": ends}
    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in cells.values())
    return "| " + " | ".join(shown) + " |"


def main() -> int:
    """Run the parts; return 0 if all have succeeded, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, help="directory of the results")
    names = [part.name for part in parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    parser.add_argument("--again", action="store_true", help="also the parts that have succeeded")
    parser.add_argument("--seconds", type=float, default=1500, help="begin no part beyond these")
    given = parser.parse_args()
    dry = given.dry_run
    if not dry and not torch.cuda.is_available():
        print("error: no CUDA device. --dry-run goes the whole way on a CPU.", file=sys.stderr)
        return 2
    directory = (given.out or RESULTS / ("gpu-day-dry" if dry else "gpu-day")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    model = {} if dry else GPU
    document = {"extends": str(ROOT / "pipelines" / "quickstart.yaml"), **model}
    (directory / RECIPE).write_text(yaml.safe_dump(document, sort_keys=False))
    began = time.monotonic()
    states = []
    for part in parts(directory):
        if part.name not in given.only:
            continue
        done = None if given.again else finished(part, directory, dry=dry)
        if done is not None:
            print(f"{part.name}: done before, in {done['seconds']} s", flush=True)
            states.append(done)
            continue
        left = given.seconds - (time.monotonic() - began)
        if left < part.limit_s:
            print(f"{part.name}: not begun, {left:.0f} s are left of its {part.limit_s:.0f}")
            continue
        print(f"{part.name}: at most {part.limit_s:.0f} s ...", flush=True)
        states.append(run(part, directory, dry=dry))
        said = states[-1]["exit"]
        print(f"{part.name}: exit {said} after {states[-1]['seconds']} s", flush=True)
        if said != 0:
            print(f"  see {directory / part.name}.log", flush=True)
    print(f"\n{write_summary(states, directory, dry=dry)}")
    return int(len(states) < len(given.only) or any(state["exit"] != 0 for state in states))


if __name__ == "__main__":
    sys.exit(main())
