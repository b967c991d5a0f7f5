"""What planning costs as the mixture and the corpus grow; CPU only, no Ray (`make bench-plan`).

The baseline draws the domain of every row at random with numpy, per step: no exact shares, no
sample identities, no resumption. Cost per step is that of 64 steps planned in one call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from raymix.sampling import (
    CorpusOrder,
    DomainGeometry,
    DomainOrder,
    MixtureEntry,
    MixtureLog,
    PackedPlanner,
)
from tests.benchmarks._report import print_table, ratio_spread, row, write_results

REPEATS = 15
STEPS = 64
MIXTURES = ((8, 16), (40, 64), (1_000, 1_024), (10_000, 1_024))
TOKENS = (10**6, 10**9, 10**12)
LOOKUPS = (128, 1_000, 4_000, 16_000)


def planner(weights_D: np.ndarray, rows: int) -> PackedPlanner:
    log = MixtureLog(tuple(f"d{at}" for at in range(weights_D.size)))
    log.append(MixtureEntry(0, 0, tuple(weights_D.tolist()), "static"))
    return PackedPlanner(n_domains=weights_D.size, rows_per_step=rows, seed=0, log=log)


def interleaved(*works: Callable[[], object]) -> list[list[float]]:
    """Return the CPU seconds of each work in each repeat, averaged over some 20 ms."""
    seconds: list[list[float]] = [[] for _ in works]
    times = [max(1, int(0.02 / cpu_seconds(work, 3))) for work in works]
    for _ in range(REPEATS):
        for work, n_times, own_seconds in zip(works, times, seconds, strict=True):
            own_seconds.append(cpu_seconds(work, n_times))
    return seconds


def cpu_seconds(work: Callable[[], object], n_times: int) -> float:
    start = time.process_time()
    for _ in range(n_times):
        work()
    return max(1e-9, time.process_time() - start) / n_times


def planning_rows(n_domains: int, rows: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    weights_D = rng.dirichlet(np.full(n_domains, 0.5))
    exact = planner(weights_D, rows)

    def draw() -> None:
        for _ in range(STEPS):
            rng.choice(n_domains, rows, p=weights_D)

    ours, theirs = interleaved(lambda: exact.plan(STEPS), draw)
    ratio, spread = ratio_spread(ours, theirs)
    name, baseline = f"plan {n_domains} domains, {rows} rows", f"draw {n_domains} domains"
    state = len(json.dumps(exact.state_dict()))
    return [
        row(baseline, min(theirs) / STEPS * 1e6, "us/step"),
        row(
            name, min(ours) / STEPS * 1e6, "us/step", ratio=ratio, spread=spread, baseline=baseline
        ),
        row(f"state {n_domains} domains", state / 1000, "KB"),
    ]


def order_rows() -> list[dict[str, object]]:
    """Cost of a look-up by corpus size, and by how many are asked for at once."""
    rows = []
    for tokens in TOKENS:
        geometry = DomainGeometry("web", units=tokens // 1024, group_units=64)
        order = DomainOrder(geometry, seed=0, window=16)
        n = np.arange(tokens // 4096, tokens // 4096 + 4_000)
        (spent,) = interleaved(lambda order=order, n=n: order.locate(n))
        rows.append(row(f"order of {tokens:.0e} tokens, 4000", min(spent) / n.size * 1e9, "ns/row"))
    for count in LOOKUPS:
        n = np.arange(12_345, 12_345 + count)
        (spent,) = interleaved(lambda n=n: order.locate(n))
        rows.append(row(f"order, {count} at once", min(spent) / count * 1e9, "ns/row"))
    shapes = [DomainGeometry(f"d{at}", 100_000 + at, 64) for at in range(8)]
    several = CorpusOrder(shapes, seed=0, window=16)
    rng = np.random.default_rng(0)
    domain, n = rng.integers(0, 8, 1024), rng.integers(0, 10**6, 1024)
    (spent,) = interleaved(lambda: several.locate(domain, n))
    rows.append(row("order, 1024 of 8 domains", min(spent) / 1024 * 1e9, "ns/row"))
    return rows


def main() -> None:
    rows = [line for mixture in MIXTURES for line in planning_rows(*mixture)]
    rows += order_rows()
    print_table(rows)
    write_results("plan", rows)


if __name__ == "__main__":
    main()
