"""Which domain each document of a target set is nearest to: what importance sampling goes by.

Shapes: D domains, V tokens of the vocabulary.
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


def nearest_documents(recipe: Recipe, corpus: Corpus) -> NDArray[np.int64] | None:
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
    count_DV = np.stack([_frequencies(corpus, name, most) for name in names])
    prior_V = (count_DV.sum(axis=0) + 1.0) / (count_DV.sum() + count_DV.shape[1])
    smooth_DV = count_DV + PRIOR_TOKENS * prior_V
    log_DV = np.log(smooth_DV) - np.log(smooth_DV.sum(axis=1, keepdims=True))
    mixed_D = np.array([name not in targets for name in names])
    nearest_D = np.zeros(len(names), dtype=np.int64)
    for target in sorted(targets):
        for tokens in _documents(corpus, target, most):
            likely_D = np.where(mixed_D, log_DV[:, tokens].sum(axis=1), -np.inf)
            nearest_D[np.argmax(likely_D)] += 1
    return nearest_D


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
