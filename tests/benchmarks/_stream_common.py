"""What all rows of the stream benchmark share: the data, the consumer, the checks. Numpy only.

Eight domains of 25,600 rows of 1,024 uint16 tokens; the first two tokens of a row say which it is
(domain, row), so that what was delivered can be checked from the tokens themselves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.paths import ROOT

CACHE = ROOT / "tests" / ".cache" / "stream"
DOMAINS, ROWS, LENGTH, BATCH = 8, 25_600, 1024, 16
WEIGHTS = np.array([0.30, 0.20, 0.15, 0.12, 0.09, 0.07, 0.05, 0.02])
WARM_UP = 20
SECONDS = 8.0
REFERENCE_SECONDS = 0.7
_MAX_BATCHES = 800_000

Rows = npt.NDArray[np.uint16]
Staging = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint16]
Fill = Callable[[Staging], None]


def rows_file() -> Path:
    """Return the file of all rows, domain after domain, written if it is not there."""
    path = CACHE / "rows.bin"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as out:
            for domain in range(DOMAINS):
                out.write(make_rows(domain).tobytes())
        part.replace(path)
    return path


def make_rows(domain: int) -> Rows:
    """Return the rows of a domain, shape (ROWS, LENGTH)."""
    generator = np.random.default_rng(domain)
    rows = generator.integers(0, 1 << 16, size=(ROWS, LENGTH), dtype=np.uint16)
    rows[:, 0], rows[:, 1] = domain, np.arange(ROWS)
    return rows


def memmap() -> Rows:
    """Return all rows, shape (DOMAINS * ROWS, LENGTH), mapped."""
    return np.memmap(rows_file(), dtype=np.uint16, mode="r", shape=(DOMAINS * ROWS, LENGTH))


def weighted_order(seed: int, batches: int) -> npt.NDArray[np.int64]:
    """Return row numbers, shape (batches, BATCH): weighted domains, each in random order."""
    generator = np.random.default_rng(seed)
    domain_N = generator.choice(DOMAINS, size=batches * BATCH, p=WEIGHTS)
    rows_N = np.empty_like(domain_N)
    for domain in range(DOMAINS):
        mine = np.flatnonzero(domain_N == domain)
        epochs = [generator.permutation(ROWS) for _ in range(-(-len(mine) // ROWS))]
        rows_N[mine] = np.concatenate([*epochs, np.empty(0, np.int64)])[: len(mine)]
    return (domain_N * ROWS + rows_N).reshape(batches, BATCH)


def gather_fill(seed: int = 0, batches: int = _MAX_BATCHES) -> Fill:
    """Return the reference: a gather from the mapped file in a random order known beforehand."""
    rows, order = memmap(), iter(weighted_order(seed, batches))
    return lambda staging: np.copyto(staging, np.take(rows, next(order), axis=0))


def fill_from(batches: Iterator[Any]) -> Fill:
    """Return a fill that copies what an iterator gives."""
    return lambda staging: np.copyto(staging, next(batches))


def first_keys(fill: Fill) -> Keys:
    """Return what the first batch was, shape (BATCH, 2), read apart as it is timed apart."""
    staging = np.empty((BATCH, LENGTH), dtype=np.int64)
    fill(staging)
    return staging[:, :2].astype(np.uint16)


def consume(
    fill: Fill,
    seconds: float,
    first: Keys,
    *,
    most: int = _MAX_BATCHES,
    pid: int | None = None,
) -> dict[str, Any]:
    """Return what came of copying batches for some seconds, after a warm-up.

    Args:
        fill: Copies the next batch into an int64 array of shape (BATCH, LENGTH).
        seconds: How long to go on.
        first: The batch read before.
        most: Batches to end with, if the time is not over before.
        pid: Root of the processes whose CPU time counts; this one if left out.
    """
    staging = np.empty((BATCH, LENGTH), dtype=np.int64)
    keys = np.empty((most, BATCH, 2), dtype=np.uint16)
    keys[0] = first
    for at in range(1, WARM_UP):
        fill(staging)
        keys[at] = staging[:, :2]
    at, clock = WARM_UP, time.perf_counter
    cpu, begun, marks = cpu_seconds(pid), clock(), []
    while at < most:
        fill(staging)
        keys[at] = staging[:, :2]
        at += 1
        if not at % 64:
            marks.append(clock() - begun)
            if marks[-1] > seconds:
                break
    wall = clock() - begun
    batches = at - WARM_UP
    half = next(i for i, mark in enumerate(marks) if mark > marks[-1] / 2)
    return {
        "us": 1e6 * wall / batches,
        "late_us": 1e6 * (marks[-1] - marks[half]) / (64 * (len(marks) - 1 - half)),
        "cpu_us": 1e6 * (cpu_seconds(pid) - cpu) / batches,
        "keys": keys[:at],
    }


def reference(seed: int = 1) -> dict[str, float]:
    """Return wall and CPU microseconds per batch of the reference, here and now."""
    fill = gather_fill(seed, 100_000)
    done = consume(fill, REFERENCE_SECONDS, first_keys(fill))
    return {"us": done["us"], "cpu_us": done["cpu_us"]}


def timed_row(make: Callable[[], Fill], seconds: float = SECONDS) -> dict[str, Any]:
    """Return a row measured in this process: the reference before and after, the row between."""
    before = reference(1)
    begun = time.perf_counter()
    fill = make()
    keys = first_keys(fill)
    first = time.perf_counter() - begun
    done = consume(fill, seconds, keys)
    return finished(done, [before, reference(2)], first)


def finished(
    done: dict[str, Any], references: list[dict[str, float]], first: float, **more: Any
) -> dict[str, Any]:
    """Return a row in JSON types, with ratios to the references and what the tokens showed."""
    wall = float(np.mean([r["us"] for r in references]))
    cpu = float(np.mean([r["cpu_us"] for r in references]))
    return {
        "mtok_s": BATCH * LENGTH / done["us"],
        "us": done["us"],
        "ratio": wall / done["us"],
        "late_ratio": wall / done["late_us"],
        "cpu_us": done["cpu_us"],
        "cpu_ratio": cpu / done["cpu_us"],
        "reference_us": wall,
        "reference_cpu_us": cpu,
        "first_s": first,
        **shown(done["keys"]),
        **more,
    }


def shown(keys: Keys) -> dict[str, Any]:
    """Return what the tokens say of the order: shares, spread, one-domain batches, repeats."""
    domain, row = keys[..., 0].ravel().astype(int), keys[..., 1].ravel().astype(int)
    shares = np.bincount(domain, minlength=DOMAINS) / domain.size
    jumps, repeats = [], 0
    for d in range(DOMAINS):
        mine = row[domain == d]
        jumps.append(np.abs(np.diff(mine)).mean() / (ROWS / 3) if mine.size > 1 else np.nan)
        # Without repeats, no row has been read more often than epochs were begun.
        for end in np.linspace(0, mine.size, 11, dtype=int)[1:]:
            often = np.bincount(mine[:end], minlength=ROWS) - -(-end // ROWS)
            repeats = max(repeats, int(often.clip(min=0).sum()))
    alone = (keys[..., 0] == keys[:, :1, 0]).all(axis=1).mean()
    return {
        "tv": float(np.abs(shares - WEIGHTS).sum() / 2),
        "one_domain": float(alone),
        "spread": float(np.nanmean(jumps)),
        "repeats": repeats,
        "batches": len(keys),
    }


def cpu_seconds(pid: int | None = None) -> float:
    """Return user and system seconds of a process and all below it, ended children included."""
    pid = pid or os.getpid()
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    total = 0
    for process in ticks:
        above: int | None = process
        while above is not None and above != pid:
            above = parents.get(above)
        total += ticks[process] if above == pid else 0
    return total / os.sysconf("SC_CLK_TCK")
