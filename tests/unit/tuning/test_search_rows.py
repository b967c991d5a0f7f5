"""The two parts of held-out text: what is chosen by is nothing of what is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raymix.errors import CorpusError
from raymix.store import Corpus
from raymix.training.evaluate.held_out import held_out_rows, search_rows
from tests.support.corpora import write_corpus
from tests.support.loops import train_corpus

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return train_corpus(tmp_path_factory.mktemp("corpus"), {"a": 20_000, "b": 9_000, "c": 300})


def whole(corpus: Corpus, name: str) -> np.ndarray:
    """Return the document of every token of a valid split, by whole rows as they are scored."""
    split = corpus.split(name, "valid")
    blocks = [corpus.read_block(name, "valid", at) for at in range(split.blocks)]
    documents, before, rows = [], 0, []
    for block in blocks:
        begins = np.zeros(len(block.tokens), dtype=np.int64)
        begins[block.starts] = 1
        documents.append(before + np.cumsum(begins))
        before = int(documents[-1][-1])
        n_tokens = len(block.tokens) // LENGTH * LENGTH
        rows += list(zip(block.tokens[:n_tokens].reshape(-1, LENGTH), strict=True))
    cut = [numbers[: len(numbers) // LENGTH * LENGTH].reshape(-1, LENGTH) for numbers in documents]
    return np.concatenate(cut)


@pytest.mark.parametrize("tested", [1, 3, 8, 20])
def test_the_parts_share_no_row_and_no_document(corpus: Corpus, tested: int) -> None:
    rows, shared = search_rows(
        corpus, sequence_length=LENGTH, rows_per_domain=6, test_rows=tested, domains=("a",)
    )
    assert shared == ()
    assert rows.tokens.shape == (6, LENGTH)
    assert set(rows.domain_B.tolist()) == {0}
    documents = whole(corpus, "a")
    # The rows are the last ones.
    last = held_out_rows(
        corpus, sequence_length=LENGTH, rows_per_domain=len(documents), domains=("a",)
    )
    np.testing.assert_array_equal(rows.tokens, last.tokens[-6:])
    assert documents[:tested].max() < documents[-6:].min()


def test_fewer_rows_where_there_are_no_more(corpus: Corpus) -> None:
    documents = whole(corpus, "b")
    tested = len(documents) - 5
    rows, shared = search_rows(
        corpus, sequence_length=LENGTH, rows_per_domain=100, test_rows=tested, domains=("b",)
    )
    assert shared == ()
    assert 1 <= len(rows.tokens) <= 5
    assert documents[:tested].max() < documents[-len(rows.tokens) :].min()


def test_too_little_text_is_refused_with_every_domain(corpus: Corpus) -> None:
    with pytest.raises(CorpusError) as caught:
        search_rows(
            corpus, sequence_length=LENGTH, rows_per_domain=4, test_rows=500, domains=("a", "c")
        )
    assert len(caught.value.problems) == 2
    assert "leave no rows for the search after the first 500 rows of 32" in str(caught.value)


def test_a_single_long_document_is_divided_and_told(tmp_path: Path) -> None:
    tokens = np.arange(4_000, dtype=np.uint16) % 50
    corpus = write_corpus(
        tmp_path, {"book": (tokens, np.array([4_000]))}, block_tokens=256, vocab_size=61
    )
    manifest = corpus.manifest
    info = manifest.domains["book"]
    swapped = info.model_copy(update={"valid": info.train})
    manifest = manifest.model_copy(update={"domains": {"book": swapped}})
    swapped_corpus = Corpus(corpus.path, manifest)
    rows, shared = search_rows(
        swapped_corpus, sequence_length=LENGTH, rows_per_domain=4, test_rows=10, domains=("book",)
    )
    assert shared == ("book",)
    assert len(rows.tokens) == 4
    first = held_out_rows(swapped_corpus, sequence_length=LENGTH, rows_per_domain=1_000).tokens
    np.testing.assert_array_equal(rows.tokens, first[-4:])
