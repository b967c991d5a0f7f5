"""Sequence scheduling: assignment of long and short sequences of a global batch to ranks.

A step's batch mixes lengths from a hundred to a hundred thousand tokens. A sequence is either local
(on one rank) or sharded over a context-parallel (CP) group of ranks, and a rank runs its sequences
in one micro-batch or several. A planner decides this from the lengths, a `Layout` of the ranks and
a `CostModel` of their speed and memory. The `Schedule` does not change the gradient: the batch is
the same, only the order of summation differs.

    layout = Layout(groups=4, context=8)
    schedule = plan_batch(lengths, layout, cost)            # planner="refine"
    schedule.micro_batches(rank)                            # per micro-step

| planner | method | planning time, 256 sequences on 32 ranks | use |
|---|---|---|---|
| refine | width rules, then local search on the cost model | 10 to 25 ms | the default |
| packed | work balanced over groups, everything sharded | 2 ms | long sequences, fast network |
| skrull | DACP and GDS (arXiv 2505.19609), corrected | 2 to 6 ms | comparison with the paper |
| hdp | fewest ranks per sequence (ByteScale) | 2 ms | no barrier, slow network |
| flexsp | CP groups of several sizes, by integer programs (FlexSP) | seconds | comparison |
| milp | optimal, by an integer program | seconds to hours | up to about 24 sequences |
| sorted | one sequence per micro-step, by length (LongAlign) | 3 ms | comparison |
| default | one sequence per micro-step | 3 ms | baseline without packing |

`refine` also evaluates the plans of `packed` and `hdp`: by its cost model it is never slower than
either. It searches batches of up to 24 sequences for up to 0.3 s, in training only where steps are
long. All planners respect memory, give every rank the same number of micro-batches (empty ones
where it has no work), are pure functions of their arguments, and do not depend on the order of ids.

How much a plan gains depends on the cost model. `preset` derives one from a model's shape and
assumptions about a device; `fit_cost_model` fits one to measurements. On a fast network `packed`
reaches nearly all of the gain over `default`; where sharding is expensive, the rest is as large.
`compare_planners` (`raymix schedule simulate`) measures it for a corpus.

Read in this order: `layout` and `cost` (ranks, seconds and memory), `plan` (schedules), `base` and
`planners` (the registry and the methods), `local_search` (the search of `refine`).
"""

from raymix.schedule.base import Planner, get_planner, known_planners, plan_batch
from raymix.schedule.compare import Comparison, compare_planners
from raymix.schedule.cost.fit import (
    Measurement,
    fit_cost_model,
    load_cost_model,
    save_cost_model,
)
from raymix.schedule.cost.model import CostModel, Link
from raymix.schedule.cost.presets import MODELS, NETWORKS, preset
from raymix.schedule.cost.timing import Placement, Timing, lower_bound
from raymix.schedule.layout import Layout
from raymix.schedule.lengths import known_distributions, sample_lengths
from raymix.schedule.plan import MicroBatch, Schedule, Shard
from raymix.schedule.planners import baselines, exact, flexsp, hdp, refine, skrull
from raymix.schedule.planners.exact import ExactPlan, solve_exact
from raymix.schedule.planners.refine import training_planner
from raymix.schedule.planners.skrull import dacp

__all__ = [
    "MODELS",
    "NETWORKS",
    "Comparison",
    "CostModel",
    "ExactPlan",
    "Layout",
    "Link",
    "Measurement",
    "MicroBatch",
    "Placement",
    "Planner",
    "Schedule",
    "Shard",
    "Timing",
    "baselines",
    "compare_planners",
    "dacp",
    "exact",
    "fit_cost_model",
    "flexsp",
    "get_planner",
    "hdp",
    "known_distributions",
    "known_planners",
    "load_cost_model",
    "lower_bound",
    "plan_batch",
    "preset",
    "refine",
    "sample_lengths",
    "save_cost_model",
    "skrull",
    "solve_exact",
    "training_planner",
]
