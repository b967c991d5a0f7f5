"""`make bench-stream`: batches per second of the stream against a numpy gather, and peers.

Eight domains of 1,024-token rows, batch 16, shuffled, everything in the page cache. Each row is
measured in a process of its own, with the reference (a gather from a mapped file in the same kind
of order) timed in that process just before and just after; ratios are to the mean of the two.
Repeats are interleaved and every second one runs in reverse. `--peers` adds other loaders, each
from an environment of their own (`.venv-peers`, made on first use).

raymix runs with live weights: its controller sets new ones every 100 batches, which the consumers
learn with their leases; in one row they follow from statistics that the consumer pushes every 100
batches. What was delivered is checked from the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks._report import ROOT, row, write_results
from tests.benchmarks._stream_common import BATCH, LENGTH, WEIGHTS, rows_file
from tests.benchmarks._stream_corpus import corpus
from tests.benchmarks.stream_peers import PEERS, VENV, install

PLAIN = ("numpy gather (reference)", "torch DataLoader", "raymix, without Ray")
RAY = (
    "raymix, 1 consumer",
    "raymix, 2 consumers",
    "raymix, 1 consumer, weights from its statistics",
    "raymix, cache of 120 MB",
    "bare Ray actor, blocks of 2048",
    "two bare Ray actors, blocks of 2048",
    "Ray Data mix, tuned, shuffle buffer",
)
_TIMEOUT_S = 420
_COLUMNS = (
    "row",
    "Mtok/s",
    "wall ratio",
    "(min-max)",
    "late",
    "CPU us",
    "CPU ratio",
    "first s",
    "off asked",
    "spread",
    "repeats",
    "n",
)

Measured = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure, print one table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="measure other loaders, too")
    parser.add_argument("--rows", nargs="*", help="only rows whose name contains one of these")
    options = parser.parse_args()
    wanted = options.rows or [""]
    rows_file()
    # Here, because the first row that reads it must not be the one that writes it.
    corpus()
    skipped: dict[str, str] = {}
    groups: list[tuple[str, list[str]]] = [("plain", [n]) for n in PLAIN] + [("ray", list(RAY))]
    if options.peers:
        skipped = install([name for name in PEERS if any(w in name for w in wanted)])
        groups += [("peer", [name]) for name in PEERS if name not in skipped]
    measured: Measured = {}
    for repeat in range(options.repeats):
        for kind, names in groups[:: -1 if repeat % 2 else 1]:
            chosen = [name for name in names if any(part in name for part in wanted)]
            if chosen:
                measure(kind, chosen, measured, skipped)
    show(measured, skipped)
    write_results("stream", [as_row(name, rows) for name, rows in measured.items()])


def measure(kind: str, names: list[str], into: Measured, skipped: dict[str, str]) -> None:
    """Run rows in a process and file what it prints."""
    module = {"plain": "_stream_plain", "ray": "_stream_ray", "peer": "stream_peers"}[kind]
    python = VENV / "bin" / "python" if kind == "peer" else Path(sys.executable)
    print(f"... {', '.join(names)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [str(python), "-m", f"tests.benchmarks.{module}", json.dumps(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S * len(names),
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    for line in done.stdout.splitlines():
        if line.startswith('{"name"'):
            row = json.loads(line)
            into.setdefault(row["name"], []).append(row)
    for name in names:
        if done.returncode and name not in into:
            last = (done.stderr.strip() or done.stdout.strip() or "?").splitlines()[-1]
            skipped[name] = last[:150]


def show(measured: Measured, skipped: dict[str, str]) -> None:
    """Print one table."""
    references = [r["reference_us"] for rows in measured.values() for r in rows]
    middle = statistics.median(references)
    print(
        f"\nReference: {BATCH * LENGTH / middle:.0f} Mtok/s, {middle:.1f} us a batch (median of "
        f"{2 * len(references)} timings); load {os.getloadavg()[0]:.1f}; weights {WEIGHTS.tolist()}"
    )
    order = sorted(measured, key=lambda name: -_median(measured[name], "ratio"))
    lines = [list(_COLUMNS), *(cells(name, measured[name]) for name in order)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        print(first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest), sep="  ")
    print(
        "late: wall ratio in the second half of the 8 s. off asked: total variation between what "
        "was delivered and asked.\nspread: mean jump between samples of a domain, 1 = full shuffle."
        " CPU us: of all processes, per batch."
    )
    for name, rows in measured.items():
        if "most_rows_off" in rows[0]:
            print(
                f"{name}: {rows[-1]['changes']} changes of weights in {rows[-1]['batches']} "
                f"batches; at no step more than {max(r['most_rows_off'] for r in rows):.2f} rows "
                f"from what was asked (bound {rows[0]['bound']:.2f})"
            )
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")


def cells(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return a row of the table."""
    ratios = [r["ratio"] for r in rows]
    return [
        name,
        f"{_median(rows, 'mtok_s'):.1f}",
        f"{statistics.median(ratios):.3f}",
        f"({min(ratios):.3f}-{max(ratios):.3f})",
        f"{_median(rows, 'late_ratio'):.3f}",
        f"{_median(rows, 'cpu_us'):.0f}",
        f"{_median(rows, 'cpu_ratio'):.3f}",
        f"{_median(rows, 'first_s'):.1f}",
        f"{_median(rows, 'tv'):.4f}",
        f"{_median(rows, 'spread'):.2f}",
        f"{max(r['repeats'] for r in rows)}",
        f"{len(rows)}",
    ]


def as_row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the JSON file: the house's columns, and all that was measured."""
    ratios = [r["ratio"] for r in rows]
    common = row(
        name,
        _median(rows, "mtok_s"),
        "Mtok/s",
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        baseline=PLAIN[0],
    )
    return common | {"repeats": rows}


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(r[key] for r in rows)


if __name__ == "__main__":
    main()
