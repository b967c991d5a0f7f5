"""Nearest domains of a target's documents, against who wrote them and against naive Bayes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.plan.target_counts import PRIOR_TOKENS, target_domain_counts
from tests.support.corpora import write_corpus
from tests.support.recipes import document

VOCAB, BLOCK = 50, 128


def recipe(corpus: Corpus, mixer: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(document(mixer=mixer, corpus={"path": corpus.path}))


def texts(seed: int, favorites: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return documents, each of mostly its favorite tokens, and their lengths."""
    generator = np.random.default_rng(seed)
    parts = [
        np.where(
            generator.random(length) < 0.7,
            generator.choice(favorite, length),
            generator.integers(0, VOCAB, length),
        )
        for favorite in favorites
    ]
    return np.concatenate(parts).astype(np.uint16), np.full(len(parts), length, dtype=np.int64)


LOW, HIGH = list(range(10)), list(range(30, 45))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    domains = {
        "high": texts(1, [HIGH] * 60, 40),
        "low": texts(2, [LOW] * 30, 40),
        "target": texts(3, [LOW] * 9 + [HIGH] * 3, 64),
    }
    return write_corpus(
        tmp_path_factory.mktemp("corpus"), domains, block_tokens=BLOCK, vocab_size=VOCAB
    )


def test_documents_go_to_the_domain_that_wrote_their_like(corpus: Corpus) -> None:
    counts = target_domain_counts(
        recipe(corpus, {"kind": "importance", "targets": "target"}), corpus
    )
    assert counts is not None
    assert counts.tolist() == [3, 9, 0]


def test_it_is_naive_bayes_with_a_dirichlet_prior(corpus: Corpus) -> None:
    blocks = {name: corpus.read_block(name, "train", 0) for name in ("high", "low", "target")}
    tokens_of = {
        name: np.concatenate(
            [
                corpus.read_block(name, "train", number).tokens
                for number in range(corpus.split(name, "train").blocks)
            ]
        )
        for name in blocks
    }
    everything = np.concatenate(list(tokens_of.values()))
    prior = (np.bincount(everything, minlength=VOCAB) + 1) / (len(everything) + VOCAB)
    scores = []
    for name in ("high", "low"):
        own = np.bincount(tokens_of[name], minlength=VOCAB)
        likely = (own + PRIOR_TOKENS * prior) / (len(tokens_of[name]) + PRIOR_TOKENS)
        scores.append(np.log(likely)[tokens_of["target"].reshape(12, 64)].sum(axis=1))
    expected = np.bincount(np.argmax(scores, axis=0), minlength=3)
    counts = target_domain_counts(
        recipe(corpus, {"kind": "importance", "targets": "target"}), corpus
    )
    assert counts is not None
    assert counts.tolist() == expected.tolist()


def test_nobody_else_asks(corpus: Corpus) -> None:
    assert target_domain_counts(recipe(corpus, {"kind": "uniform"}), corpus) is None
