"""What every benchmark shares: the environment it ran in, one table, one JSON file.

A row is a dict with the keys `name, value, unit, ratio, spread, baseline`; `ratio` compares
`value` with the row named `baseline`, and `spread` is the (lowest, highest) ratio over the
repeats. Repeats of the two sides are interleaved, so that a machine that slows down hits both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

RESULTS = Path(os.environ.get("RAYMIX_BENCH_RESULTS", ROOT / "bench-results"))
COLUMNS = ("name", "value", "unit", "ratio", "spread", "baseline")
_PACKAGES = ("ray", "torch", "numpy", "pyarrow", "tokenizers", "transformers")


def environment() -> dict[str, Any]:
    """Return hardware, versions, commit and load: what a figure means nothing without."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "modified": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "load": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def row(
    name: str,
    value: float,
    unit: str,
    *,
    ratio: float | None = None,
    spread: tuple[float, float] | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Return one row of a table."""
    values = (name, value, unit, ratio, spread, baseline)
    return dict(zip(COLUMNS, values, strict=True))


def ratio_spread(
    ours: Sequence[float], theirs: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """Return the median and the (lowest, highest) of the ratios of interleaved repeats."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), (min(ratios), max(ratios))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as one aligned table."""
    cells = [[_shown(column, item.get(column)) for column in COLUMNS] for item in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    for number, line in enumerate([list(COLUMNS), *cells]):
        pairs = enumerate(zip(line, widths, strict=True))
        print("  ".join(c.rjust(w) if 0 < i < 5 else c.ljust(w) for i, (c, w) in pairs).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))


def write_results(name: str, rows: Sequence[Mapping[str, Any]], *, tell: bool = True) -> Path:
    """Write `bench-results/NAME.json` and return its path; say so, unless told not to."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"environment": environment(), "rows": [dict(item) for item in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n")
    if tell:
        print(f"\nwritten to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return path


def _shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "spread":
        return f"{value[0]:.3g}-{value[1]:.3g}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
