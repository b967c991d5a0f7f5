"""Planners side by side, what planning costs, and how far from the best (`make bench-schedule`).

Simulated by cost models that are assumed, not measured: ratios are to be looked at, and what the
network changes. CPU seconds, one thread, no Ray. `--steps` batches per setting (default 2),
`--instances` exact plans (default 100) of `--nodes` (default 1,000), `--planners` for a part.

Settings: seven published distributions of lengths, two models, two networks; 256 sequences on 4
groups of 8 ranks, a sequence on one rank or on a group (and again with teams of 2 and 4).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymix.schedule import (
    MODELS,
    NETWORKS,
    CostModel,
    Layout,
    compare_planners,
    known_distributions,
    known_planners,
    lower_bound,
    plan_batch,
    preset,
    sample_lengths,
    solve_exact,
)
from tests.benchmarks._report import print_table, row, write_results

GROUPS, CONTEXT, BATCH = 4, 8, 256
CORPUS = 20_000
# Where the search of exact plans ends (and at `--nodes`); the bound it has proved by then counts.
GAP = 2e-3
SIZES = ((256, 4), (4096, 64))
REPEATS = 3

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One distribution on one machine."""

    name: str
    lengths: np.ndarray
    layout: Layout
    cost: CostModel


def settings(widths: tuple[int, ...] = ()) -> Iterator[Setting]:
    layout = Layout(GROUPS, CONTEXT, widths=widths)
    teams = " teams" if widths else ""
    for network in NETWORKS:
        for model in MODELS:
            cost = preset(model, network)
            longest = CONTEXT * cost.memory_tokens
            for name in known_distributions():
                lengths = sample_lengths(name, CORPUS, seed=0, longest=longest)
                yield Setting(f"{model} {network} {name}{teams}", lengths, layout, cost)


def table(steps: int, planners: Sequence[str], widths: tuple[int, ...] = ()) -> Rows:
    """Speed-ups over `default` and `packed`, and shares of the bound, per setting and planner."""
    rows: Rows = []
    behind: list[float] = []
    for setting in settings(widths):
        results = compare_planners(
            setting.lengths,
            setting.layout,
            setting.cost,
            batch=BATCH,
            steps=steps,
            planners=planners,
        ).document()["planners"]
        fastest = next(iter(results))
        cells = []
        for name in planners:
            one = results[name]
            assert not one["memory_violations"]
            rows.append(
                row(f"{setting.name}: {name}", one["speedup_over_default"], "x over default",
                    ratio=one["speedup_over_packed"], baseline="packed")
            )  # fmt: skip
            rows.append(
                row(f"{setting.name}: {name}", 100 * one["share_of_bound"], "% of the bound")
            )
            cells.append(
                f"{one['speedup_over_default']:.2f} {one['speedup_over_packed']:.2f} "
                f"{one['share_of_bound']:.0%}"
            )
        gap = results["refine"]["step_s"] / results[fastest]["step_s"] - 1
        behind.append(gap)
        print(f"| {setting.name} | {' | '.join(cells)} | {fastest} |", flush=True)
    rows.append(row(f"refine behind the best planner, most{widths}", 100 * max(behind), "%"))
    return rows


def planning(repeats: int) -> Rows:
    """CPU milliseconds per plan: the median, and the most, over all settings."""
    rows: Rows = []
    for batch, groups in SIZES:
        for name in ("refine", "packed", "skrull", "hdp", "sorted", "default"):
            spent = []
            for setting in settings():
                lengths = setting.lengths[:batch]
                layout = Layout(groups, CONTEXT)
                spent.append(
                    min(cpu_ms(lengths, layout, setting.cost, name) for _ in range(repeats))
                )
            what = f"plan {batch} for {layout.ranks} ranks: {name}"
            rows.append(row(f"{what}, median", statistics.median(spent), "ms"))
            rows.append(row(f"{what}, most", max(spent), "ms"))
    return rows


def cpu_ms(lengths: np.ndarray, layout: Layout, cost: CostModel, name: str) -> float:
    begin = time.process_time()
    plan_batch(lengths, layout, cost, name)
    return 1000 * (time.process_time() - begin)


def instances(count: int, base: int) -> Iterator[tuple[np.ndarray, Layout, CostModel]]:
    """Random small problems: up to 24 sequences, memory from loose to tight, 1 or 2 groups."""
    rng = np.random.default_rng(base)
    for seed in range(base * 100_000, base * 100_000 + count):
        cost = preset(rng.choice(list(MODELS)), rng.choice(list(NETWORKS)))
        name = str(rng.choice(known_distributions()))
        context, groups = int(rng.choice([2, 4, 8])), int(rng.choice([1, 1, 2]))
        size = int(rng.integers(3, 25 if groups == 1 else 13))
        drawn = sample_lengths(name, size, seed=seed, longest=8 * cost.memory_tokens)
        lengths = np.sort(drawn)[::-1]
        share = float(rng.choice([0.3, 0.6, 0.9, 1.4]))
        room = max(-(-int(lengths[0]) // context), lengths.sum() / (context * groups * share))
        inner = tuple(width for width in (2, 4) if context % width == 0)
        widths = inner if rng.random() < 0.25 else ()
        layout = Layout(groups, context, widths=widths)
        yield lengths, layout, replace(cost, memory_tokens=int(np.ceil(room)))


def exactness(count: int, nodes: int, seed: int) -> Rows:
    """How much slower `refine` is than the best plan, and than the bound proved for all plans."""
    above_plan, above_bound, spent = [], [], []
    for lengths, layout, cost in instances(count, seed):
        begin = time.process_time()
        exact = solve_exact(lengths, layout, cost, gap=GAP, nodes=nodes)
        spent.append(time.process_time() - begin)
        seconds = plan_batch(lengths, layout, cost).seconds
        above_plan.append(100 * (seconds / exact.seconds - 1))
        bound = max(exact.bound, lower_bound(lengths, layout, cost))
        above_bound.append(100 * (seconds / bound - 1))
    return [
        row(f"refine above the exact plan, mean of {count}", statistics.mean(above_plan), "%"),
        row(f"refine above the exact plan, most of {count}", max(above_plan), "%"),
        row("refine above the proved bound, mean", statistics.mean(above_bound), "%"),
        row("refine above the proved bound, most", max(above_bound), "%"),
        row("exact plan, mean", statistics.mean(spent), "s"),
        row("exact plan, most", max(spent), "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0, help="of the instances")
    parser.add_argument("--planners", default="")
    parser.add_argument("--only", choices=["table", "teams", "planning", "exactness"])
    given = parser.parse_args()
    planners = [name for name in given.planners.split(",") if name]
    planners = planners or [name for name in known_planners() if name != "milp"]
    rows: Rows = []
    for part, widths in (("table", ()), ("teams", (2, 4))):
        if given.only in (None, part):
            print(f"\nspeed-up over default, over packed, share of the bound; widths {widths}")
            print(f"| setting | {' | '.join(planners)} | fastest |", flush=True)
            rows += table(given.steps, planners, widths)
    if given.only in (None, "planning"):
        rows += planning(REPEATS)
    if given.only in (None, "exactness"):
        rows += exactness(given.instances, given.nodes, given.seed)
    print()
    print_table([line for line in rows if ":" not in line["name"] or line["unit"] == "ms"])
    write_results("schedule" if given.only is None else f"schedule-{given.only}", rows)


if __name__ == "__main__":
    main()
