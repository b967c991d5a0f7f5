"""On-disk format of a prepared corpus: written by `raymix.corpus`, read while training.

```
CORPUS/manifest.json                            written last: its presence means complete
CORPUS/tokenizer/                               Hugging Face files
CORPUS/DOMAIN/{train,valid}/shard-00000.arrow   Arrow IPC file, one row per record batch = block
CORPUS/DOMAIN/{train,valid}/documents.arrow     tokens of each document
CORPUS/DOMAIN/{train,valid}/loss_mask.arrow     loss mask, where only answers are learned
CORPUS/DOMAIN/rejects.jsonl                     sample of the bad records
```

A split is one stream of tokens: documents in order, each ended by the end-of-text token, cut
into blocks of exactly `block_tokens` tokens; only the last block may be shorter. Read `block`,
`shard`, `manifest`, `corpus`; `remote/` has files by URL. Corpora read in place have no shards:
their manifest names token files of other tools, which `formats/` reads.
"""

from raymix.store.block import Block, StartArray, TokenArray, block_schema
from raymix.store.columns import read_lengths, write_lengths
from raymix.store.corpus import Corpus
from raymix.store.loss_mask import LossMask
from raymix.store.manifest import (
    SPLITS,
    DomainInfo,
    Manifest,
    ShardInfo,
    Split,
    SplitInfo,
    TokenizerInfo,
    corpus_fingerprint,
    token_dtype,
)
from raymix.store.remote.files import atomic_write_bytes, atomic_write_text
from raymix.store.shard import ShardWriter

BLOCK_SCHEMA = block_schema

__all__ = [
    "BLOCK_SCHEMA",
    "SPLITS",
    "Block",
    "Corpus",
    "DomainInfo",
    "LossMask",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "Split",
    "SplitInfo",
    "StartArray",
    "TokenArray",
    "TokenizerInfo",
    "atomic_write_bytes",
    "atomic_write_text",
    "block_schema",
    "corpus_fingerprint",
    "read_lengths",
    "token_dtype",
    "write_lengths",
]
