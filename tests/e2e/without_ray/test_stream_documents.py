"""Document mode: whole documents, packed, dealt to ranks, the same for any number of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from raymix.control.documents import DocumentChunk
from raymix.recipe.training import DocumentData
from raymix.sampling import batch_hash
from raymix.store import Corpus
from tests.streams import Seen, fixed, local, local_stream, read, small_corpus

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


def in_rows(seen: Seen, padding: int) -> list[list[int]]:
    """Return the documents found in the rows of a step."""
    found = []
    for row, starts in zip(seen.tokens, seen.starts, strict=True):
        bounds = [*starts, LENGTH]
        parts = [row[a:b].tolist() for a, b in pairwise(bounds)]
        found += [part for part in parts if part != [padding]]
    return found


def test_rows_hold_the_planned_documents_whole(corpus: Corpus) -> None:
    known = all_documents(corpus)
    padding = corpus.manifest.tokenizer.eos_id
    stream = local_stream(corpus, local(fixed(SHARES), corpus), documents())
    for _ in range(40):
        (seen,) = read(stream, 1)
        assert isinstance(stream._chunk, DocumentChunk)
        plan = stream._chunk._steps[seen.step - stream._chunk._first][1].plan
        assert seen.batch_hash == batch_hash(plan.domain_N, plan.index_N)
        planned = [
            known[domain][document]
            for domain, document in zip(plan.domain_N, plan.document_N, strict=True)
        ]
        # One-token documents and padding look alike, and neither has a label.
        found = sorted(in_rows(seen, padding))
        assert found == sorted(document for document in planned if document != [padding])
        assert seen.label_tokens == sum(len(document) - 1 for document in planned)
        assert seen.counts == np.bincount(plan.domain_N, minlength=3).tolist()
        assert 90 <= plan.length_N.sum() < 90 + LENGTH


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_get_equally_many_rows_and_share_the_documents(
    corpus: Corpus, world_size: int
) -> None:
    padding = corpus.manifest.tokenizer.eos_id
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus), documents()), 20)
    parts = [
        read(
            local_stream(
                corpus,
                local(fixed(SHARES), corpus),
                documents(),
                rank=rank,
                world_size=world_size,
            ),
            20,
        )
        for rank in range(world_size)
    ]
    for alone, *together in zip(whole, *parts, strict=True):
        assert len({part.tokens.shape for part in together}) == 1
        found = [document for part in together for document in in_rows(part, padding)]
        assert sorted(found) == sorted(in_rows(alone, padding))
        assert {part.batch_hash for part in together} == {alone.batch_hash}
        assert {part.label_tokens for part in together} == {alone.label_tokens}
        # Labels add up over ranks: tokens that the next one in the row follows in its document.
        labels = sum(LENGTH - 1 - sum(s > 0 for s in row) for p in together for row in p.starts)
        assert labels == alone.label_tokens


@pytest.mark.parametrize("stop", [0, 1, 9, 17])
def test_a_run_resumes_anywhere(corpus: Corpus, stop: int) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus), documents()), 25)
    stream = local_stream(corpus, local(fixed(SHARES), corpus), documents(), world_size=2)
    read(stream, stop)
    state = json.loads(json.dumps(stream.state_dict()))
    again = local_stream(corpus, local(fixed(SHARES), corpus), documents(), state=state)
    rest = [seen.batch_hash for seen in read(again, 25 - stop)]
    assert rest == [seen.batch_hash for seen in whole[stop:]]


def test_a_small_budget_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    whole = read(local_stream(corpus, local(fixed(SHARES), corpus), documents()), 30)
    tight = local_stream(corpus, local(fixed(SHARES), corpus), documents(), budget_bytes=1000)
    for seen, alike in zip(read(tight, 30), whole, strict=True):
        np.testing.assert_array_equal(seen.tokens, alike.tokens)


def test_one_domain_rows_are_named_by_it(corpus: Corpus) -> None:
    stream = local_stream(corpus, local(fixed((0, 1, 0)), corpus), documents())
    assert set(stream.next().domain_rows.tolist()) == {1}
