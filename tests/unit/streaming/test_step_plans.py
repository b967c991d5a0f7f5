"""Plans of steps from lengths alone: whole, within memory, and the same however one gets there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raymix.errors import ScheduleError
from raymix.recipe.training import DocumentData
from raymix.schedule import Layout
from raymix.store import Corpus
from raymix.streaming.sequences.step_plans import StepPlans
from tests.support.step_plans import (
    CONFIG,
    COST,
    DATA,
    document_positions,
    expected,
    log_of,
    mixed_corpus,
    same,
    start,
)
from tests.support.streams import fixed, local, local_stream, read


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return mixed_corpus(tmp_path_factory.mktemp("corpus"))


def plans_at(corpus: Corpus, until: int) -> StepPlans:
    plans = StepPlans(corpus, DATA, CONFIG)
    plans.reset(start(corpus), log_of(corpus).entries, until)
    return plans


def test_every_document_of_a_step_is_somewhere_whole(corpus: Corpus) -> None:
    for parts in expected(corpus, log_of(corpus), 6):
        shares_of: dict[int, list[float]] = {}
        for rank, part in enumerate(parts):
            for micro in part.micro_batches:
                assert micro.tokens <= COST.memory_tokens
                for position in micro.local:
                    shares_of.setdefault(position, []).append(1.0)
                for shard in micro.sharded:
                    assert rank in shard.ranks
                    shares_of.setdefault(shard.sequence, []).append(1 / len(shard.ranks))
        assert sorted(shares_of) == list(range(len(shares_of)))
        assert all(sum(shares) == pytest.approx(1) for shares in shares_of.values())
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert len({(part.label_tokens, part.batch_hash, part.version) for part in parts}) == 1


def test_the_documents_are_those_that_the_stream_reads(corpus: Corpus) -> None:
    log = log_of(corpus, (0,))
    stream = local_stream(corpus, local(fixed(log.at(0).weights), corpus), DATA)
    for parts, seen in zip(expected(corpus, log, 4), read(stream, 4), strict=True):
        assert parts[0].batch_hash == seen.batch_hash
        assert parts[0].label_tokens == seen.label_tokens


def test_a_new_start_gives_the_same_plans(corpus: Corpus) -> None:
    whole = expected(corpus, log_of(corpus), 8)
    plans = plans_at(corpus, 8)
    plans.plan(3)
    assert plans.planned_steps == (0, 1, 2, 3)
    again = plans_at(corpus, 2)
    assert not again.can_plan(2)
    again.extend_log((), 8)
    assert all(same(again.plan(7).for_rank(rank), whole[7][rank]) for rank in range(4))
    again.drop_before(6)
    assert again.planned_steps == (6, 7)
    assert not again.can_plan(5)
    assert again.can_plan(6)


def test_the_future_is_not_planned_before_its_weights_are_known(corpus: Corpus) -> None:
    log = log_of(corpus, (0, 4, 6))
    plans = StepPlans(corpus, DATA, CONFIG)
    assert not plans.can_plan(0)
    plans.reset(start(corpus), log.entries[:1], 4)
    assert plans.can_plan(3)
    assert not plans.can_plan(4)
    plans.plan(3)
    plans.extend_log(log.entries, 7)
    plans.extend_log(log.entries[:2], 5)
    whole = expected(corpus, log, 7)
    assert same(plans.plan(6).for_rank(0), whole[6][0])
    assert plans.version == 2


def test_a_document_too_long_for_a_group_is_refused_with_the_numbers(corpus: Corpus) -> None:
    config = replace(CONFIG, layout=Layout(4, 1))
    with pytest.raises(ScheduleError, match=r"data.sequence_length = 100: .* 1 x 60 = 60 tokens"):
        StepPlans(corpus, DATA, config)
    short = DocumentData(mode="documents", sequence_length=60, tokens_per_step=400)
    StepPlans(corpus, short, config)


def test_an_unknown_planner_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ScheduleError, match="Did you mean 'refine'"):
        StepPlans(corpus, DATA, replace(CONFIG, planner="refin"))


def test_a_rank_holds_no_document_twice(corpus: Corpus) -> None:
    part = expected(corpus, log_of(corpus), 1)[0][0]
    shares_of = document_positions(part)
    assert len(shares_of) == len(set(shares_of)) > 0


def test_a_corpus_is_read_by_its_index_only(tmp_path: Path) -> None:
    corpus = mixed_corpus(tmp_path)
    for shard in tmp_path.rglob("shard-*.arrow"):
        shard.unlink()
    expected(corpus, log_of(corpus), 1)
