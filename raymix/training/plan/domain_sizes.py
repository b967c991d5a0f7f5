"""What each domain has to give: counted in a prepared corpus, or estimated from its sources."""

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
    TrainedTokenizer,
)
from raymix.store import Corpus
from raymix.streaming.blocks.geometry import epoch_rows

# A token id in a file of ready ids: between uint16 and int64, mostly int32.
_ID_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSizes:
    """What one domain holds for training."""

    name: str
    tokens: int
    """Tokens of the training split; estimated ones are rounded to three digits."""
    usable: int
    """Tokens that one epoch reads: whole rows, or documents cut to the sequence length."""
    valid_tokens: int
    """Tokens of the held-out split."""
    documents: int | None = None
    """Documents of the training split; None where it is not prepared."""
    bytes_per_token: float | None = None
    """UTF-8 bytes per token; None where it is not known."""
    unigram_entropy: float | None = None
    """Nats per token; None where it is not prepared."""

    @property
    def dropped(self) -> int:
        """Return the tokens that an epoch leaves out."""
        return self.tokens - self.usable


def prepared_sizes(corpus: Corpus, data: DataConfig) -> list[DomainSizes]:
    """Return what the domains of a prepared corpus hold, in its order."""
    found = []
    for name in corpus.domain_names:
        train, valid = corpus.split(name, "train"), corpus.split(name, "valid")
        if isinstance(data, PackedData):
            rows = epoch_rows(train.tokens, corpus.manifest.block_tokens, data.sequence_length)
            usable = rows * data.sequence_length
        else:
            lengths = corpus.document_lengths(name, "train")
            usable = int(np.minimum(lengths, data.sequence_length).sum(dtype=np.int64))
        found.append(
            DomainSizes(
                name=name,
                tokens=train.tokens,
                usable=usable,
                valid_tokens=valid.tokens,
                documents=train.documents,
                bytes_per_token=train.bytes / train.tokens if train.tokens else None,
                unigram_entropy=train.unigram_entropy,
            )
        )
    return found


def estimated_sizes(config: CorpusConfig, data: DataConfig) -> list[DomainSizes]:
    """Return what the sources of a recipe may hold, from file sizes alone.

    Raises:
        CorpusError: If a glob matches nothing, or a file lacks the column.
    """
    from raymix.corpus.read.parts import plan_parts
    from raymix.corpus.read.sources import find_sources

    parts = plan_parts(config.domains, find_sources(config))
    found = []
    for domain in config.domains:
        sizes = {"yes": 0, "no": 0, "by hash": 0}
        for part in parts[domain.name]:
            sizes[part.held_out] += part.size
        held_out = sizes["yes"] + config.valid_fraction * sizes["by hash"]
        train = sizes["no"] + (1 - config.valid_fraction) * sizes["by hash"]
        per_token = _bytes_per_token(config, domain)
        tokens = _three_digits(train / per_token)
        length = data.sequence_length if isinstance(data, PackedData) else 1
        found.append(
            DomainSizes(
                name=domain.name,
                tokens=tokens,
                usable=tokens // length * length,
                valid_tokens=_three_digits(held_out / per_token),
            )
        )
    return found


def _bytes_per_token(config: CorpusConfig, domain: DomainConfig) -> float:
    """Return a guess: on mixed text a BPE gains about 0.4 bytes per token with each doubling."""
    if domain.tokens_column is not None:
        return _ID_BYTES
    if isinstance(config.tokenizer, ByteTokenizer):
        return 1.0
    if isinstance(config.tokenizer, TrainedTokenizer):
        return min(4.6, 0.4 * math.log2(config.tokenizer.vocab_size) - 1.6)
    return 4.4


def _three_digits(value: float) -> int:
    if value < 1000:
        return int(value)
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return int(value // unit * unit)
