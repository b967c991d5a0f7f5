"""Document mode: whole documents, assigned to ranks by a schedule, the same for any number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raymix.recipe.training import DocumentData
from raymix.sampling import DocumentStep, batch_hash
from raymix.schedule import CostModel, Layout
from raymix.store import Corpus
from raymix.streaming.batches.assign import assign_locally
from raymix.streaming.batches.documents import DocumentBatchInfo, DocumentChunk
from raymix.streaming.batches.stream import MixtureStream
from tests.support.streams import fixed, local, local_stream, read, small_corpus

SHARES = (0.5, 0.3, 0.2)
LENGTH = 24


def documents(**changes: object) -> DocumentData:
    values = {"mode": "documents", "sequence_length": LENGTH, "tokens_per_step": 90}
    return DocumentData.model_validate(values | {"shuffle_blocks": 2} | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"), tokens=1000)


def all_documents(corpus: Corpus) -> list[list[list[int]]]:
    """Return every document's tokens, by domain, cut to the sequence length."""
    result = []
    for name in corpus.domain_names:
        blocks = range(corpus.split(name, "train").blocks)
        tokens = np.concatenate([corpus.read_block(name, "train", b).tokens for b in blocks])
        ends = np.cumsum(corpus.document_lengths(name, "train"), dtype=np.int64)
        result.append([d[:LENGTH].tolist() for d in np.split(tokens, ends[:-1])])
    return result


def plan_of(stream: MixtureStream, step: int) -> DocumentStep:
    assert isinstance(stream._chunk, DocumentChunk)
    info = stream._chunk.batch(step).info
    assert isinstance(info, DocumentBatchInfo)
    return info.plan


def test_a_rank_alone_holds_the_planned_documents_whole(corpus: Corpus) -> None:
    known = all_documents(corpus)
    stream = local_stream(corpus, local(fixed(SHARES), corpus), documents())
    for _ in range(40):
        (seen,) = read(stream, 1)
        plan = plan_of(stream, seen.step)
        assert seen.batch_hash == batch_hash(plan.domain_N, plan.index_N)
        planned = [
            (domain, (0,), known[domain][document])
            for domain, document in zip(plan.domain_N, plan.document_N, strict=True)
        ]
        assert sorted(d for micro in seen.micro_batches for d in micro) == sorted(planned)
        assert seen.label_tokens == sum(len(tokens) - 1 for _, _, tokens in planned)
        assert seen.counts == np.bincount(plan.domain_N, minlength=3).tolist()
        assert 90 <= plan.length_N.sum() < 90 + LENGTH


@pytest.mark.parametrize(("groups", "context"), [(2, 1), (7, 1), (1, 2), (2, 2)])
def test_ranks_hold_what_the_schedule_says(corpus: Corpus, groups: int, context: int) -> None:
    layout = Layout(groups, context)
    # So little memory that long documents must be shared where they can be.
    memory = LENGTH if context == 1 else LENGTH // 2 + 1
    cost = CostModel(quadratic_s=0.1, linear_s=1.0, memory_tokens=memory)
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus), documents()), 20)
    parts = [
        read(
            local_stream(
                corpus,
                local(fixed(SHARES), corpus),
                documents(),
                rank=rank,
                world_size=layout.ranks,
                assignments=assign_locally(layout, cost),
            ),
            20,
        )
        for rank in range(layout.ranks)
    ]
    shared = 0
    for alone, *together in zip(whole, *parts, strict=True):
        assert len({len(part.micro_batches) for part in together}) == 1
        assert {part.batch_hash for part in together} == {alone.batch_hash}
        assert {part.label_tokens for part in together} == {alone.label_tokens}
        shared_once = [
            (domain, tokens)
            for rank, part in enumerate(together)
            for micro in part.micro_batches
            for domain, ranks, tokens in micro
            if rank == ranks[0]
        ]
        assert sorted(shared_once) == sorted(d[::2] for micro in alone.micro_batches for d in micro)
        for rank, part in enumerate(together):
            for at, micro in enumerate(part.micro_batches):
                assert sum(-(-len(tokens) // len(team)) for _, team, tokens in micro) <= memory
                for document in micro:
                    shared += len(document[1]) > 1
                    others = [together[r].micro_batches[at] for r in document[1]]
                    assert rank in document[1]
                    assert all(document in other for other in others)
    assert bool(shared) == (context > 1)


@pytest.mark.parametrize("stop", [0, 1, 9, 17])
def test_a_run_resumes_anywhere(corpus: Corpus, stop: int) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus), documents()), 25)
    stream = local_stream(corpus, local(fixed(SHARES), corpus), documents(), world_size=2)
    read(stream, stop)
    state = json.loads(json.dumps(stream.state_dict()))
    again = local_stream(corpus, local(fixed(SHARES), corpus), documents(), state=state)
    hashes = [seen.batch_hash for seen in read(again, 25 - stop)]
    assert hashes == [seen.batch_hash for seen in whole[stop:]]


def test_a_small_budget_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus), documents()), 30)
    tight = local_stream(corpus, local(fixed(SHARES), corpus), documents(), budget_bytes=1000)
    for seen, alike in zip(read(tight, 30), whole, strict=True):
        assert seen.micro_batches == alike.micro_batches
