"""Which rank takes which sequence: plans of global batches of long and short sequences.

A step's batch mixes lengths of a hundred tokens and of a hundred thousand. Each sequence can sit
whole on one rank (local) or be spread over the ranks of a context-parallel group (sharded); a group
takes its sequences in one micro-batch or several. A planner decides all of it from the lengths, a
`Layout` of the ranks and a `CostModel` of their speed and memory; the result is a `Schedule`, which
changes nothing about the gradient: the batch stays as it is, and only sums are reordered.

    layout = Layout(groups=4, context=8)
    schedule = plan_batch(lengths, layout, cost)            # planner="refine"
    schedule.micro_batches(rank)                            # what one rank does, step by step

| planner | what it does | a batch of 256 on 32 ranks costs | when |
|---|---|---|---|
| refine | rules of width, then moves that the cost model likes | 10 to 25 ms | the default |
| packed | work balanced over groups, everything sharded | 2 ms | all sequences long, fast network |
| skrull | DACP and GDS (arXiv 2505.19609), repaired | 2 to 6 ms | to compare with the paper |
| hdp | as few ranks per sequence as hold it (ByteScale) | 2 ms | no barrier, slow network |
| flexsp | teams of several sizes, by integer programs (FlexSP) | seconds | to compare |
| milp | the best there is | seconds to hours | up to about 24 sequences |
| sorted | one sequence per micro-step, by length (LongAlign) | 3 ms | to compare |
| default | one sequence per micro-step | 3 ms | what one would do unpacked |

`refine` starts from `packed` and `hdp` too, so it is never slower than those by its cost model. It
searches batches of up to 24 for up to 0.3 s, in training only where steps are long.
All planners respect memory, give every rank the same number of micro-batches (empty ones where it
has nothing), are pure functions of their arguments, and do not care in which order ids come.

What the plans are worth depends on the cost model. `preset` makes one from a model's shape and
assumptions about a device; `fit_cost_model` makes one from measurements. On a fast network nearly
all of the gain over `default` is that of `packed`; where sharding is dear, the rest is as large.
`compare_planners` (`raymix schedule simulate`) shows which it is for a corpus.
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
from raymix.schedule.planners.exact import Exact, solve_exact
from raymix.schedule.planners.paced import training_planner
from raymix.schedule.planners.skrull import dacp

__all__ = [
    "MODELS",
    "NETWORKS",
    "Comparison",
    "CostModel",
    "Exact",
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
