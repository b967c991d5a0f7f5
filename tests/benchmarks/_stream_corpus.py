"""The stream benchmark's rows as a prepared corpus; unlike `_stream_common` this needs raymix."""

from __future__ import annotations

from raymix.store import Corpus
from tests.benchmarks._stream_common import CACHE, DOMAINS, LENGTH, ROWS, make_rows
from tests.support.corpora import random_documents, write_corpus

NAMES = tuple(f"d{d}" for d in range(DOMAINS))


def corpus() -> Corpus:
    """Return the corpus, written if it is not there."""
    root = CACHE / "corpus"
    if not (root / "manifest.json").exists():
        domains = {
            name: (make_rows(d).reshape(-1), random_documents(name, ROWS * LENGTH, 600.0))
            for d, name in enumerate(NAMES)
        }
        write_corpus(root, domains, block_tokens=256 * LENGTH, shard_blocks=100)
    return Corpus.open(str(root))
