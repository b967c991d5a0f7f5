"""A small corpus of long and short documents, and plans of its steps made one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymix.recipe.training import DocumentData
from raymix.sampling import MixtureEntry, MixtureLog
from raymix.schedule import CostModel, Layout, Link
from raymix.store import Corpus
from raymix.streaming.sequences.step_plans import RankMicroBatches, SchedulingConfig, StepPlans
from tests.support.corpora import labeled_domain, write_corpus

COST = CostModel(
    quadratic_s=1e-7,
    linear_s=1e-5,
    base_s=1e-4,
    links=(Link(8, 1e-5, 1e-7),),
    memory_tokens=60,
)
DATA = DocumentData(mode="documents", sequence_length=100, tokens_per_step=400, shuffle_blocks=2)
CONFIG = SchedulingConfig(seed=5, layout=Layout(2, 2), cost=COST, planner="hdp")


def mixed_corpus(root: Path) -> Corpus:
    return write_corpus(
        root,
        {f"d{d}": labeled_domain(d, 4000, mean) for d, mean in enumerate((9.0, 40.0, 90.0))},
        block_tokens=96,
        shard_blocks=3,
    )


def log_of(corpus: Corpus, changes: Sequence[int] = (0, 4)) -> MixtureLog:
    shares = ((0.5, 0.3, 0.2), (0.1, 0.2, 0.7), (0.3, 0.3, 0.4))
    entries = [
        MixtureEntry(version, step, shares[version % 3], "fixed")
        for version, step in enumerate(changes)
    ]
    return MixtureLog(corpus.domain_names, entries)


def start(corpus: Corpus) -> Mapping[str, Any]:
    zeros = [0] * len(corpus.domain_names)
    return {"step": 0, "carry": zeros, "count": zeros}


def expected(
    corpus: Corpus, log: MixtureLog, steps: int, config: SchedulingConfig = CONFIG
) -> list[list[RankMicroBatches]]:
    """Return every rank's part of each step, planned in this process."""
    plans = StepPlans(corpus, DATA, config)
    plans.reset(start(corpus), log.entries, steps)
    ranks = range(config.layout.ranks)
    return [[plans.plan(step).for_rank(rank) for rank in ranks] for step in range(steps)]


def same(one: RankMicroBatches, two: RankMicroBatches) -> bool:
    return one == two


def document_positions(part: RankMicroBatches) -> list[int]:
    """Return the positions in the step of the documents that a rank has, whole or a shard of."""
    return [
        position
        for micro in part.micro_batches
        for position in (*micro.local, *(shard.sequence for shard in micro.sharded))
    ]
