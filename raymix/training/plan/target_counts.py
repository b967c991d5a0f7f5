"""Which domain each document of a target set is nearest to: what importance sampling goes by.

Shapes: D domains, N documents of the targets, V tokens of the vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raymix.recipe import ImportanceMixer, Recipe
from raymix.store import Corpus

PRIOR_TOKENS = 2000.0
"""Weight of the whole corpus's frequencies in a domain's (Dirichlet smoothing)."""

_MOST_TOKENS = 1 << 26
"""Tokens read in all; of each domain an equal part, from blocks evenly spaced."""
_MOST_PER_DOMAIN = 1 << 20


def target_domain_counts(recipe: Recipe, corpus: Corpus) -> NDArray[np.int64] | None:
    """Return how many documents of the recipe's targets are nearest to each domain, shape (D,).

    None for mixers that do not ask. A document is nearest to the domain whose token frequencies
    make it likeliest; targets themselves have none.

    Raises:
        CorpusError: If a shard cannot be read.
    """
    targets = set(recipe.mixer.targets) & set(corpus.domain_names)
    if not isinstance(recipe.mixer, ImportanceMixer) or not targets:
        return None
    names = corpus.domain_names
    most = min(_MOST_PER_DOMAIN, _MOST_TOKENS // len(names))
    # The counts of all domains at once would fill the memory where there are thousands.
    total_V = np.zeros(corpus.manifest.tokenizer.vocab_size)
    for name in names:
        total_V += _frequencies(corpus, name, most)
    prior_V = PRIOR_TOKENS * (total_V + 1.0) / (total_V.sum() + total_V.size)
    documents = [part for target in sorted(targets) for part in _documents(corpus, target, most)]
    tokens = np.concatenate(documents)
    first_N = np.cumsum([0, *(len(part) for part in documents[:-1])])
    nearest_N, likeliest_N = np.zeros(len(documents), np.int64), np.full(len(documents), -np.inf)
    for domain, name in enumerate(names):
        if name in targets:
            continue
        smooth_V = _frequencies(corpus, name, most) + prior_V
        likely_N = np.add.reduceat(np.log(smooth_V / smooth_V.sum())[tokens], first_N)
        nearer_N = likely_N > likeliest_N
        nearest_N[nearer_N], likeliest_N[nearer_N] = domain, likely_N[nearer_N]
    return np.bincount(nearest_N, minlength=len(names)).astype(np.int64)


def _blocks(corpus: Corpus, domain: str, most: int) -> list[int]:
    """Return blocks of a domain's training split, evenly spaced, of about `most` tokens."""
    split = corpus.split(domain, "train")
    keep = max(1, min(split.blocks, -(-most * split.blocks // max(1, split.tokens))))
    return np.unique(np.linspace(0, split.blocks - 1, keep).round().astype(np.int64)).tolist()


def _frequencies(corpus: Corpus, domain: str, most: int) -> NDArray[np.float64]:
    """Return the counts of a domain's tokens, shape (V,)."""
    count_V = np.zeros(corpus.manifest.tokenizer.vocab_size)
    for block in _blocks(corpus, domain, most):
        tokens = corpus.read_block(domain, "train", block).tokens
        count_V += np.bincount(tokens, minlength=count_V.size)
    return count_V


def _documents(corpus: Corpus, domain: str, most: int) -> list[NDArray[np.unsignedinteger]]:
    """Return the documents of a domain, each as far as it lies in one block."""
    found: list[NDArray[np.unsignedinteger]] = []
    for number in _blocks(corpus, domain, most):
        block = corpus.read_block(domain, "train", number)
        found += [part for part in np.split(block.tokens, block.starts) if part.size]
    return found
