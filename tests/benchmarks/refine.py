"""Ablation of the parts of the planner `refine` (`make bench-refine`).

Every part is left out in turn; the step times are those of the cost model, in percent above the
whole search, and CPU time is that of planning. Settings: as in `tests.benchmarks.schedule`, with
a sequence on one rank or a group, and with groups of 2 and 4 ranks too. Batches of 256 sequences
on 4 groups of 8 ranks are searched with the small budget, batches of 20 on one group with the
full one, which has annealing. A part that is worth less than 0.5 % in both should go.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from raymix.schedule import CostModel, Layout, lower_bound
from raymix.schedule.cost.timing import compute_timing
from raymix.schedule.local_search.partitions import SearchBudget
from raymix.schedule.planners.refine import FAST_BUDGET, FULL_BUDGET, search_placement
from tests.benchmarks._report import print_table, row, write_results
from tests.benchmarks.schedule import CONTEXT, settings

Problem = tuple[np.ndarray, Layout, CostModel]

LARGE, SMALL = 256, 20


def parts(budget: SearchBudget) -> Iterator[tuple[str, SearchBudget]]:
    """Yield each part's name and the budget without it."""
    yield "exchanges between groups", replace(budget, exchange_rounds=0)
    if budget.extra_micro_batches:
        yield "more micro-batches than needed", replace(budget, extra_micro_batches=0)
    yield "several partitions", replace(budget, assigned_partitions=1)
    yield (
        "several rules of a kind",
        replace(budget, rules_per_kind=1, exchange_rules_per_kind=1, dense_rules=False),
    )
    if budget.anneal:
        # Its second start, the plan of `hdp`, belongs to the full search and goes with it.
        yield "annealing", replace(budget, anneal=False)


def problems(size: int, batches: int) -> Iterator[Problem]:
    """Yield the batches of all settings; of small ones, on one group with little memory left."""
    for widths in ((), (2, 4)):
        for setting in settings(widths):
            for number in range(batches):
                lengths = setting.lengths[number * size : (number + 1) * size]
                if size == LARGE:
                    yield np.sort(lengths)[::-1], setting.layout, setting.cost
                    continue
                layout = Layout(1, CONTEXT, widths=widths)
                longest = -(-int(lengths.max()) // CONTEXT)
                room = max(longest, int(np.ceil(lengths.sum() / (CONTEXT * 1.8))))
                cost = replace(setting.cost, memory_tokens=room)
                yield np.sort(lengths)[::-1], layout, cost


def seconds(problem: Problem, budget: SearchBudget) -> tuple[float, float]:
    """Return seconds of the step by the cost model, and CPU seconds of planning it."""
    lengths, layout, cost = problem
    begin = time.process_time()
    placement = search_placement(lengths, layout, cost, budget)
    spent = time.process_time() - begin
    return compute_timing(lengths, placement, layout, cost).seconds, spent


def ablation(name: str, budget: SearchBudget, every: list[Problem]) -> list[dict[str, object]]:
    whole = np.array([seconds(problem, budget) for problem in every])
    bound = np.array([lower_bound(*problem) for problem in every])
    rows = [
        row(f"{name}: whole, above the bound, mean", 100 * (whole[:, 0] / bound - 1).mean(), "%"),
        row(f"{name}: whole, CPU, mean", 1000 * whole[:, 1].mean(), "ms"),
    ]
    for part, smaller in parts(budget):
        without = np.array([seconds(problem, smaller) for problem in every])
        slower = 100 * (without[:, 0] / whole[:, 0] - 1)
        what = f"{name}: without {part}"
        rows += [
            row(f"{what}, mean", slower.mean(), "% slower"),
            row(f"{what}, 90th percentile", float(np.quantile(slower, 0.9)), "% slower"),
            row(f"{what}, most", slower.max(), "% slower"),
            row(f"{what}, CPU, mean", 1000 * without[:, 1].mean(), "ms"),
        ]
        print(
            f"{what}: mean {slower.mean():.2f} %, 90th percentile {np.quantile(slower, 0.9):.2f} %,"
            f" most {slower.max():.2f} %, least {slower.min():.2f} %;"
            f" CPU {1000 * without[:, 1].mean():.1f} of {1000 * whole[:, 1].mean():.1f} ms",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=2, help="per setting")
    given = parser.parse_args()
    rows = ablation("256 sequences", FAST_BUDGET, list(problems(LARGE, given.batches)))
    rows += ablation("20 sequences", FULL_BUDGET, list(problems(SMALL, given.batches)))
    print_table(rows)
    write_results("refine", rows)


if __name__ == "__main__":
    main()
