"""Preparing a corpus with Ray Data: read, clean, tokenize, deduplicate, split, shard, count.

`prepare` is the whole. Its passes, in the order in which to read them: `sources` finds the files,
`parts` cuts them into work, `tokenize` turns a part into tokens, `select` decides which documents
stay and in which split, `assemble` writes the shards, `entropy` counts them.
"""

from raymix.corpus.preparation import IfExists, prepare
from raymix.corpus.progress import PrepareProgress
from raymix.corpus.state import differences

__all__ = ["IfExists", "PrepareProgress", "differences", "prepare"]
