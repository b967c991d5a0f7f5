"""What faults do to a run: the table, each row at some random moments (`make bench-faults`).

Every row is `raymix train` of 120 steps on two workers of a private Ray cluster on this machine
(`node lost`: on one of four raylets), to which something happens after a step that is drawn. `0`
for tokens means: by domain, as many tokens as the run that nothing happened to, from the same
batches in the same steps. Seconds to recover are the longest time after the fault without a step
that had not been done before; nearly all of them are processes that start and import.

    python -m tests.benchmarks.faults [--moments 5] [--only "worker killed" ...] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks._report import RESULTS, row, write_results
from tests.support.faults import FAULTS, STEPS, Ending, Fault, endure
from tests.support.scenes import RECIPE, Scene
from tests.support.shell import Shell, write_recipe


def workspace(path: Path) -> tuple[Shell, Path]:
    """Return a shell where the corpus is prepared, and a run that nothing happened to."""
    write_recipe(path / RECIPE, train__steps=STEPS)
    shell = Shell(path)
    shell.ok("prepare", RECIPE)
    calm = Scene(shell, "calm")
    calm.start()
    assert calm.ends() == 0, calm.said()
    return shell, calm.run


def tell(name: str, fault: Fault, endings: list[Ending], failures: list[str]) -> dict[str, object]:
    """Print one row of the table and return it."""
    if failures:
        print(
            f"{name:38s}{len(failures)} FAILED: {failures[0].strip().splitlines()[-1]}", flush=True
        )
    if not endings:
        return row(name, float("nan"), "s to recover") | {"failures": failures}
    seconds = sorted(ending.recovered_s for ending in endings)
    tokens = max(abs(count) for ending in endings for count in ending.tokens.values())
    repeated = [ending.repeated for ending in endings]
    differing = max(ending.differing for ending in endings)
    loss = max(ending.loss for ending in endings)
    print(
        f"{name:38s}{len(endings):3d}{statistics.median(repeated):9.0f}{max(repeated):5d}"
        f"{differing:11d}{tokens:8d}{loss:10.1e}{statistics.median(seconds):9.0f}"
        f"{seconds[-1]:6.0f}  {fault.sees}",
        flush=True,
    )
    spread = (seconds[0], seconds[-1])
    result = row(name, statistics.median(seconds), "s to recover", spread=spread)
    more: dict[str, object] = {
        "repeated": repeated,
        "differing": differing,
        "tokens": tokens,
        "loss": loss,
    }
    more |= {"at": [ending.at for ending in endings], "failures": failures}
    return result | more | {"sees": fault.sees}


def rows_to_keep(anew: Sequence[str]) -> list[dict[str, object]]:
    """Return the rows of the last results that are not to be run."""
    path = RESULTS / "faults.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [item for item in rows if item["name"] not in anew]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=5, help="random moments per row")
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the other rows there are")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    drawn = random.Random(options.seed)
    rows = rows_to_keep(options.only) if options.keep else []
    print(
        f"{'':38s}{'':3s}{'steps repeated':>14s}{'steps that':>11s}{'tokens':>8s}{'loss':>10s}"
        f"{'s to recover':>15s}\n{'fault':38s}{'of':>3s}{'median':>9s}{'max':>5s}{'differ':>11s}"
        f"{'off':>8s}{'off by':>10s}{'median':>9s}{'max':>6s}  what the user sees"
    )
    with tempfile.TemporaryDirectory(prefix="raymix-faults-") as directory:
        shell, calm = workspace(Path(directory))
        for name in options.only:
            endings, failures = [], []
            for moment in range(options.moments):
                at = drawn.randrange(5, STEPS - 25)
                run = f"{name}-{moment}"
                try:
                    endings.append(endure(shell, run, FAULTS[name], at, calm))
                # Hours of other rows are not lost with it.
                except (AssertionError, OSError) as error:
                    failures.append(f"{run} at step {at}: {error}")
            rows.append(tell(name, FAULTS[name], endings, failures))
            write_results("faults", rows, tell=name == options.only[-1])


if __name__ == "__main__":
    main()
