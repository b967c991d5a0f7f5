"""Writes small prepared corpora of known tokens, in the real format, without tokenizing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raymix.store import (
    Block,
    Corpus,
    DomainInfo,
    Manifest,
    ShardWriter,
    SplitInfo,
    TokenizerInfo,
    atomic_write_text,
    corpus_fingerprint,
    token_dtype,
    write_lengths,
)

Tokens = npt.NDArray[np.unsignedinteger]
Lengths = npt.NDArray[np.int64]


def _blocks(tokens: Tokens, lengths: Lengths, block_tokens: int) -> Iterator[Block]:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
    for first in range(0, len(tokens), block_tokens):
        last = min(first + block_tokens, len(tokens))
        a, b = np.searchsorted(starts, [first, last])
        yield Block(
            np.ascontiguousarray(tokens[first:last]), (starts[a:b] - first).astype(np.uint32)
        )


def _write_split(
    root: Path, where: str, tokens: Tokens, lengths: Lengths, block_tokens: int, shard_blocks: int
) -> SplitInfo:
    blocks = list(_blocks(tokens, lengths, block_tokens))
    shards = []
    for number, first in enumerate(range(0, len(blocks), shard_blocks)):
        file = f"{where}/shard-{number:05d}.arrow"
        with ShardWriter(str(root), file, tokens.dtype) as writer:
            for block in blocks[first : first + shard_blocks]:
                writer.write(block)
        shards.append(writer.info)
    write_lengths(str(root / where / "documents.arrow"), [lengths])
    return SplitInfo(
        documents=len(lengths),
        tokens=len(tokens),
        bytes=0,
        blocks=len(blocks),
        shards=tuple(shards),
        length_quantiles={},
        length_histogram={},
        unigram_entropy=0.0,
        bigram_entropy=0.0,
    )


def write_corpus(
    root: Path,
    domains: Mapping[str, tuple[Tokens, Lengths]],
    *,
    block_tokens: int,
    vocab_size: int = 65_536,
    shard_blocks: int = 8,
) -> Corpus:
    """Return the corpus written to `root`: per domain its tokens and document lengths."""
    tokenizer = TokenizerInfo(kind="none", fingerprint="none", vocab_size=vocab_size, eos_id=0)
    dtype = token_dtype(vocab_size)
    infos = {}
    for name, (tokens, lengths) in domains.items():
        empty = (tokens[:0].astype(dtype), lengths[:0])
        train = _write_split(
            root, f"{name}/train", tokens.astype(dtype), lengths, block_tokens, shard_blocks
        )
        valid = _write_split(root, f"{name}/valid", *empty, block_tokens, shard_blocks)
        infos[name] = DomainInfo(
            train=train,
            valid=valid,
            records_read=len(lengths),
            rejected=0,
            duplicates=0,
            too_short=0,
            too_long=0,
        )
    manifest = Manifest(
        fingerprint=corpus_fingerprint(tokenizer, block_tokens, infos),
        tokenizer=tokenizer,
        block_tokens=block_tokens,
        domains=infos,
    )
    atomic_write_text(str(root / "manifest.json"), manifest.model_dump_json())
    return Corpus.open(str(root))


def random_documents(seed: str, tokens: int, mean_length: float) -> Lengths:
    """Return document lengths that sum to `tokens`, geometric with the mean given."""
    generator = np.random.default_rng(list(hashlib.blake2b(seed.encode()).digest()))
    draws = generator.geometric(1 / mean_length, size=int(3 * tokens / mean_length) + 10)
    ends = np.cumsum(draws)
    last = int(np.searchsorted(ends, tokens))
    lengths = draws[: last + 1].astype(np.int64)
    lengths[-1] -= ends[last] - tokens
    return lengths[lengths > 0]


def labeled_domain(domain: int, tokens: int, mean_length: float = 40.0) -> tuple[Tokens, Lengths]:
    """Return tokens that say where they are (domain in the top bits, position below it)."""
    ids = (domain << 12) + np.arange(tokens) % 4093
    return ids.astype(np.uint16), random_documents(f"domain{domain}", tokens, mean_length)
