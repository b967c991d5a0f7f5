"""Counts of target documents by nearest domain, for the importance mixer.

A document's nearest domain is the one with the largest likelihood under a smoothed unigram model.

Shapes: D domains, N documents of the targets, V tokens of the vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raymix.recipe import ImportanceMixer, Recipe
from raymix.store import Corpus

PRIOR_TOKENS = 2000.0
"""Pseudo-counts of the corpus-wide token frequencies in each domain (Dirichlet smoothing)."""

# A million tokens settle the frequencies of all but rare tokens; the total limits the time that a
# run with thousands of domains takes to start.
_MAX_TOKENS = 1 << 26
_MAX_DOMAIN_TOKENS = 1 << 20


def target_domain_counts(recipe: Recipe, corpus: Corpus) -> NDArray[np.int64] | None:
    """Return the number of target documents nearest to each domain, shape (D,).

    None unless the recipe's mixer is the importance mixer. Targets themselves get 0.

    Raises:
        CorpusError: If a shard cannot be read.
    """
    targets = set(recipe.mixer.targets) & set(corpus.domain_names)
    if not isinstance(recipe.mixer, ImportanceMixer) or not targets:
        return None
    names = corpus.domain_names
    max_tokens = min(_MAX_DOMAIN_TOKENS, _MAX_TOKENS // len(names))
    # Two passes over the domains: a (D, V) table of counts would take gigabytes for thousands of
    # domains.
    total_V = np.zeros(corpus.manifest.tokenizer.vocab_size)
    for name in names:
        total_V += _token_counts(corpus, name, max_tokens)
    prior_V = PRIOR_TOKENS * (total_V + 1.0) / (total_V.sum() + total_V.size)
    documents: list[NDArray[np.unsignedinteger]] = []
    for target in sorted(targets):
        documents += _documents(corpus, target, max_tokens)
    tokens = np.concatenate(documents)
    start_N = np.cumsum([0, *(len(document) for document in documents[:-1])])
    nearest_N, best_N = np.zeros(len(documents), np.int64), np.full(len(documents), -np.inf)
    for domain, name in enumerate(names):
        if name in targets:
            continue
        smooth_V = _token_counts(corpus, name, max_tokens) + prior_V
        # Log-likelihoods of all documents at once; `reduceat` sums from each start to the next.
        score_N = np.add.reduceat(np.log(smooth_V / smooth_V.sum())[tokens], start_N)
        # Strictly better: ties go to the first domain, in the order of the corpus.
        better_N = score_N > best_N
        nearest_N[better_N], best_N[better_N] = domain, score_N[better_N]
    return np.bincount(nearest_N, minlength=len(names)).astype(np.int64)


def _blocks(corpus: Corpus, domain: str, max_tokens: int) -> list[int]:
    """Return evenly spaced blocks of a domain's training split, of about `max_tokens` tokens."""
    split = corpus.split(domain, "train")
    count = max(1, min(split.blocks, -(-max_tokens * split.blocks // max(1, split.tokens))))
    # A domain has its sources one after the other, so its first blocks are not typical.
    return np.unique(np.linspace(0, split.blocks - 1, count).round().astype(np.int64)).tolist()


def _token_counts(corpus: Corpus, domain: str, max_tokens: int) -> NDArray[np.float64]:
    """Return the counts of each token in a sample of a domain, shape (V,)."""
    count_V = np.zeros(corpus.manifest.tokenizer.vocab_size)
    for block in _blocks(corpus, domain, max_tokens):
        tokens = corpus.read_block(domain, "train", block).tokens
        count_V += np.bincount(tokens, minlength=count_V.size)
    return count_V


def _documents(corpus: Corpus, domain: str, max_tokens: int) -> list[NDArray[np.unsignedinteger]]:
    """Return the documents in a sample of a domain, cut at block boundaries."""
    documents: list[NDArray[np.unsignedinteger]] = []
    for number in _blocks(corpus, domain, max_tokens):
        block = corpus.read_block(domain, "train", number)
        # The part before the first start is empty where a document starts with the block.
        documents += [part for part in np.split(block.tokens, block.starts) if part.size]
    return documents
