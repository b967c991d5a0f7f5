"""The sequence scheduler: the same plans in any order of requests, and after a restart."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import ray

from raymix.errors import TrainingError
from raymix.sampling import MixtureLog
from raymix.schedule import Layout
from raymix.store import Corpus
from raymix.streaming.batches.assign import AssignmentContext
from raymix.streaming.sequences.actor import (
    PlanRequest,
    RemoteSequenceScheduler,
    start_sequence_scheduler,
)
from raymix.streaming.sequences.step_plans import SchedulingConfig
from tests.support.step_plans import (
    CONFIG,
    DATA,
    document_positions,
    expected,
    log_of,
    mixed_corpus,
    same,
    start,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return mixed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def actor(ray_cluster: None, corpus: Corpus) -> Iterator[Any]:
    handle = start_sequence_scheduler(corpus, DATA)
    yield handle
    ray.kill(handle)


def clients(handle: Any, corpus: Corpus, log: MixtureLog, attempt: str = "a") -> list[Any]:
    def planner_state(_: int) -> Mapping[str, Any]:
        return start(corpus)

    def until() -> int:
        # The log is final up to here: it is to change at step 4.
        return STEPS if len(log.entries) > 1 else 4

    readers = [
        AssignmentContext(rank=rank, log=log, until=until, planner_state=planner_state)
        for rank in range(CONFIG.layout.ranks)
    ]
    return [RemoteSequenceScheduler(handle, CONFIG, reader, attempt=attempt) for reader in readers]


def test_the_order_of_asking_does_not_matter(actor: Any, corpus: Corpus) -> None:
    log = log_of(corpus)
    whole = expected(corpus, log, STEPS)
    ranks = clients(actor, corpus, log)
    # Rank 3 runs three steps ahead, the others come in all orders.
    for step in range(3):
        assert same(ranks[3].assignment(step), whole[step][3])
    for step in range(3):
        for rank in ((2, 0, 1), (0, 1, 2), (1, 2, 0))[step]:
            assert same(ranks[rank].assignment(step), whole[step][rank])
    for rank in (1, 3, 0, 2):
        assert same(ranks[rank].assignment(3), whole[3][rank])


def test_plans_are_the_same_after_it_was_killed(actor: Any, corpus: Corpus) -> None:
    log = log_of(corpus)
    whole = expected(corpus, log, STEPS)
    ranks = clients(actor, corpus, log)
    for step in range(STEPS):
        if step in (4, 7):
            os.kill(ray.get(actor.status.remote())["pid"], signal.SIGKILL)
        for rank, client in enumerate(ranks):
            assert same(client.assignment(step), whole[step][rank])


def test_it_plans_ahead_but_never_beyond_known_weights(actor: Any, corpus: Corpus) -> None:
    log = log_of(corpus)
    request = PlanRequest(
        attempt="a", rank=0, step=0, until=2, version=1, entries=tuple(log.entries),
        state=start(corpus), config=CONFIG,
    )  # fmt: skip
    ray.get(actor.plan.remote(request))
    planned: list[int] = []
    while planned != [0, 1]:
        planned = ray.get(actor.status.remote())["held"]
    assert ray.get(actor.plan.remote(replace(request, step=2, entries=(), state=None))) is None
    client = clients(actor, corpus, log)[0]
    with pytest.raises(TrainingError, match="not decided"):
        client.assignment(STEPS)


def test_new_log_entries_are_used(actor: Any, corpus: Corpus) -> None:
    log = log_of(corpus, (0, 4, 6))
    whole = expected(corpus, log, STEPS)
    known = MixtureLog(log.domains, log.entries[:1])
    ranks = clients(actor, corpus, known)
    for step in range(STEPS):
        if step == 4:
            known.append(log.entries[1])
            known.append(log.entries[2])
        assert same(ranks[0].assignment(step), whole[step][0])


def test_an_earlier_attempt_is_refused(actor: Any, corpus: Corpus) -> None:
    log = log_of(corpus)
    whole = expected(corpus, log, 2)
    old, new = clients(actor, corpus, log, "old"), clients(actor, corpus, log, "new")
    for step in range(2):
        assert same(old[0].assignment(step), whole[step][0])
    assert same(new[1].assignment(0), whole[0][1])
    with pytest.raises(TrainingError, match="a later attempt, new"):
        old[1].assignment(0)


def test_512_ranks_are_answered(corpus: Corpus, ray_cluster: None) -> None:
    config = SchedulingConfig(seed=1, layout=Layout(64, 8), cost=CONFIG.cost)
    data = DATA.model_copy(update={"tokens_per_step": 20_000})
    handle = start_sequence_scheduler(corpus, data)
    log = log_of(corpus)
    request = PlanRequest(
        attempt="a", rank=0, step=0, until=3, version=1, entries=tuple(log.entries),
        state=start(corpus), config=config,
    )  # fmt: skip
    for step in range(3):
        requests = [replace(request, rank=rank, step=step) for rank in range(512)]
        answers = [handle.plan.remote(r) for r in requests]
        parts = ray.get(answers, timeout=300)
        assert len({part.batch_hash for part in parts}) == 1
        planned = {position for part in parts for position in document_positions(part)}
        assert planned == set(range(len(planned)))
    ray.kill(handle)
