"""Tokens of each domain: counted in a prepared corpus, or estimated from its sources."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raymix.recipe import (
    ByteTokenizer,
    CorpusConfig,
    DataConfig,
    DomainConfig,
    PackedData,
    PretrainedTokenizer,
    TrainedTokenizer,
)
from raymix.recipe.corpus import TOKEN_FORMATS
from raymix.store import Corpus, token_dtype
from raymix.streaming.blocks.geometry import epoch_rows

# Bytes of a token id in a file of ready ids: uint16 to int64, mostly int32.
_ID_BYTES = 4
# Bytes per token of the usual pretrained vocabularies (32,000 to 150,000 tokens) on mixed text.
_PRETRAINED_BYTES_PER_TOKEN = 4.4


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSizes:
    """Tokens and documents of one domain."""

    name: str
    tokens: int
    """Tokens of the training split; estimated ones are rounded to three digits."""
    usable: int
    """Tokens that one epoch reads: whole rows, or documents cut to the sequence length."""
    valid_tokens: int
    """Tokens of the held-out split."""
    documents: int | None = None
    """Documents of the training split; None if it is not prepared."""
    bytes_per_token: float | None = None
    """UTF-8 bytes per token; None if unknown."""
    unigram_entropy: float | None = None
    """Nats per token; None if the corpus is not prepared."""
    unlearned: int = 0
    """Documents that are cut before their first answer: no token of them is in the loss."""

    @property
    def dropped(self) -> int:
        """Return the tokens that an epoch does not read."""
        return self.tokens - self.usable


def prepared_sizes(corpus: Corpus, data: DataConfig) -> list[DomainSizes]:
    """Return the sizes of the domains of a prepared corpus, in its order."""
    sizes = []
    for name in corpus.domain_names:
        train, valid = corpus.split(name, "train"), corpus.split(name, "valid")
        unlearned = 0
        if isinstance(data, PackedData):
            rows = epoch_rows(train.tokens, corpus.manifest.block_tokens, data.sequence_length)
            # An incomplete row at the end of a block is dropped, at each block.
            usable = rows * data.sequence_length
        else:
            lengths = corpus.document_lengths(name, "train")
            usable = int(np.minimum(lengths, data.sequence_length).sum(dtype=np.int64))
            if (mask := corpus.loss_mask(name, "train")) is not None:
                end_N = np.cumsum(lengths, dtype=np.int64)
                cut_N = end_N - lengths + np.minimum(lengths, data.sequence_length)
                unlearned = int(np.count_nonzero(mask.count(end_N - lengths, cut_N) == 0))
        sizes.append(
            DomainSizes(
                name=name,
                tokens=train.tokens,
                usable=usable,
                valid_tokens=valid.tokens,
                documents=train.documents,
                bytes_per_token=train.bytes / train.tokens if train.tokens else None,
                unigram_entropy=train.unigram_entropy,
                unlearned=unlearned,
            )
        )
    return sizes


def estimated_sizes(config: CorpusConfig, data: DataConfig) -> list[DomainSizes]:
    """Return estimated sizes of a recipe's domains, from the sizes of the source files alone.

    Raises:
        CorpusError: If a glob matches nothing, or a file lacks the column.
    """
    from raymix.corpus.read.parts import plan_parts
    from raymix.corpus.read.sources import find_sources

    parts = plan_parts(config.domains, find_sources(config))
    sizes = []
    for domain in config.domains:
        # Files are held out, or not, or split by a hash of each document.
        bytes_by_split = {"yes": 0, "no": 0, "by hash": 0}
        for part in parts[domain.name]:
            bytes_by_split[part.held_out] += part.size
        hashed = bytes_by_split["by hash"]
        valid_bytes = bytes_by_split["yes"] + config.valid_fraction * hashed
        train_bytes = bytes_by_split["no"] + (1 - config.valid_fraction) * hashed
        token_file = any(
            file_slice.file.format in TOKEN_FORMATS
            for part in parts[domain.name]
            for file_slice in part.slices[:1]
        )
        bytes_per_token = (
            _id_bytes(config, domain) if token_file else _bytes_per_token(config, domain)
        )
        # More digits would look like a count.
        tokens = _three_digits(train_bytes / bytes_per_token)
        # Lengths of documents are unknown here, so in document mode none is taken to be cut.
        length = data.sequence_length if isinstance(data, PackedData) else 1
        sizes.append(
            DomainSizes(
                name=domain.name,
                tokens=tokens,
                usable=tokens // length * length,
                valid_tokens=_three_digits(valid_bytes / bytes_per_token),
            )
        )
    return sizes


def _bytes_per_token(config: CorpusConfig, domain: DomainConfig) -> float:
    """Return an estimate of the UTF-8 bytes per token of a domain."""
    if domain.tokens_column is not None:
        return _ID_BYTES
    if isinstance(config.tokenizer, ByteTokenizer):
        return 1.0
    if isinstance(config.tokenizer, TrainedTokenizer):
        # On mixed text a BPE gains about 0.4 bytes per token with each doubling of its vocabulary.
        return min(4.6, 0.4 * math.log2(config.tokenizer.vocab_size) - 1.6)
    return _PRETRAINED_BYTES_PER_TOKEN


def _id_bytes(config: CorpusConfig, domain: DomainConfig) -> float:
    """Return the bytes of an id in the token files of a domain, as most tools choose them."""
    from raymix.corpus.tokenizers.tokenizer import load_pretrained

    if domain.token_dtype is not None:
        return np.dtype(domain.token_dtype).itemsize
    if isinstance(config.tokenizer, PretrainedTokenizer):
        return token_dtype(load_pretrained(config.tokenizer).info.vocab_size).itemsize
    return 2


def _three_digits(value: float) -> int:
    if value < 1000:
        return int(value)
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return int(value // unit * unit)
