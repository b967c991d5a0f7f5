"""From the command to the first step: seconds, and CPU seconds by process (`make bench-start`).

The run is the tiny one of the tests, its corpus prepared and its files read before. The baseline of
a run with workers is the same run with `cluster.fork_workers=false`, each of whose processes loads
its modules itself; the two are interleaved. CPU seconds are those of the command and everything
below it until the first step, by process.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks._report import print_table, ratio_spread, row, write_results
from tests.support.scenes import descendants
from tests.support.shell import Shell, write_recipe

REPEATS = 3
_TICKS = os.sysconf("SC_CLK_TCK")
_POLL_S = 0.1
_STEP = re.compile(r"^step\s+1/")


@dataclass(frozen=True, slots=True)
class Start:
    """One start."""

    wall_s: float
    cpu_s: Counter[str]
    """CPU seconds by name of process."""
    stages: dict[str, float]
    """Seconds until each stage began."""

    @property
    def total_cpu_s(self) -> float:
        """Return the CPU seconds of all processes."""
        return sum(self.cpu_s.values())


def measured(shell: Shell, *arguments: str, until: re.Pattern[str] | None) -> Start:
    """Run a command and measure it until a line of its output, or its end."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        shell.command(*arguments),
        cwd=shell.cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    seen: dict[int, tuple[str, float]] = {}
    stages: dict[str, float] = {}
    reached = None
    while reached is None and process.poll() is None:
        seen |= _below(process.pid)
        for line in process.stdout.readlines():
            if match := re.match(r"\s*([\d.]+) s  (.*)", line):
                stages[match[2]] = float(match[1])
            if until is not None and until.match(line):
                reached = time.perf_counter() - begun
        time.sleep(_POLL_S)
    wall = time.perf_counter() - begun if reached is None else reached
    seen |= _below(process.pid)
    os.set_blocking(process.stdout.fileno(), True)
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    cpu: Counter[str] = Counter()
    for name, seconds in seen.values():
        cpu[name] += seconds
    return Start(wall, cpu, stages)


def _below(root: int) -> dict[int, tuple[str, float]]:
    """Return name and CPU seconds of a process and all below it, by its number."""
    processes = {}
    for pid in (root, *descendants(root)):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        processes[pid] = (_name(pid, root), (int(fields[11]) + int(fields[12])) / _TICKS)
    return processes


def _name(pid: int, root: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        words = ""
    if pid == root:
        return "command"
    if match := re.match(r"ray::[\w]+", words):
        return match[0]
    for part in ("raylet", "gcs_server", "setup_worker", "dashboard", "raymix"):
        if part in words:
            return {"raymix": "server of forks"}.get(part, part)
    return "other"


def main(repeats: int) -> None:
    """Measure, print and write the table."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as directory:
        shell = Shell(Path(directory))
        write_recipe(shell.cwd / "tiny.yaml")
        shell.ok("prepare", "tiny.yaml")
        starts: dict[str, list[Start]] = {}
        cases = {
            "2 workers": ("train", "cluster.workers=2"),
            "2 workers, not forked": ("train", "cluster.workers=2", "cluster.fork_workers=false"),
            "cluster.workers=0": ("train", "cluster.workers=0"),
            "plan": ("plan",),
        }
        for repeat in range(-1, repeats):
            for name, (command, *changes) in cases.items():
                fresh = [f"name=run{repeat}", "train.steps=3"]
                until = _STEP if command == "train" else None
                start = measured(shell, command, "tiny.yaml", *changes, *fresh, until=until)
                # The first round reads all files, and is not counted.
                if repeat >= 0:
                    starts.setdefault(name, []).append(start)
                shutil.rmtree(shell.cwd / "runs", ignore_errors=True)
    rows = [
        each
        for unit in ("s", "CPU s")
        for name, own in starts.items()
        for each in [_row(name, unit, own, starts)]
    ]
    for name, own in starts.items():
        last = own[-1]
        rows += [row(f"{name}: {part}", value, "CPU s") for part, value in last.cpu_s.most_common()]
        rows += [row(f"{name}: until {stage}", value, "s") for stage, value in last.stages.items()]
    print_table(rows)
    write_results("start", rows)


def _row(name: str, unit: str, own: list[Start], starts: dict[str, list[Start]]) -> dict[str, Any]:
    values = [_value(start, unit) for start in own]
    if name != "2 workers":
        return row(f"{name}, {unit}", statistics.median(values), unit)
    baseline = "2 workers, not forked"
    ratio, spread = ratio_spread(values, [_value(start, unit) for start in starts[baseline]])
    return row(
        f"{name}, {unit}",
        statistics.median(values),
        unit,
        ratio=ratio,
        spread=spread,
        baseline=f"{baseline}, {unit}",
    )


def _value(start: Start, unit: str) -> float:
    return start.wall_s if unit == "s" else start.total_cpu_s


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    main(parser.parse_args().repeats)
