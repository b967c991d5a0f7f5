"""The third pass: shards of blocks from the documents that were selected, counted on the way.

A shard is one stretch of a split's stream. Its task finds the parts that the stretch crosses,
takes their selected documents in order, cuts them into blocks and writes the file, the counts of
tokens and pairs, and a marker that lets another run skip it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from raymix._utils.json import parse_json
from raymix.corpus.passes.cut import TokenPiece, clip, cut_blocks
from raymix.corpus.passes.entropy import (
    PairCounter,
    ShardCounts,
    bigram_entropy,
    pair_stride,
    unigram_entropy,
)
from raymix.corpus.passes.select import CODES, read_documents
from raymix.corpus.passes.tokenize import part_base
from raymix.store import ShardInfo, ShardWriter, Split, atomic_write_text, token_dtype
from raymix.store.remote import files

# Small enough to write within a task's memory, large enough for few requests to a bucket.
SHARD_BYTES = 64 << 20
"""Bytes of token ids in a full shard."""

MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 1 << 12, 1 << 20
WINDOW_BLOCKS = 16
"""Blocks that training shuffles together by default; a domain should have that many."""

# 4 million tokens, 8 or 16 MB: large reads, small memory.
_CHUNK_TOKENS = 1 << 22


def automatic_block_tokens(train_tokens: Sequence[int]) -> int:
    """Return the block size for domains of so many training tokens: a power of two.

    The smallest domain still has the 16 blocks of a shuffling window, so that its order is as
    random as any; blocks of fewer than 4,096 tokens would cost more than they hold, and beyond
    2**20 tokens (2 or 4 MB) reading gains nothing more.
    """
    per_block = max(min(train_tokens) // WINDOW_BLOCKS, 1)
    return min(max(1 << (per_block.bit_length() - 1), MIN_BLOCK_TOKENS), MAX_BLOCK_TOKENS)


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the tokens [low, high) of a split, from the parts they come from.

    `parts` holds (part number, tokens of the split before it) for each part that is crossed.
    """

    domain: str
    split: Split
    number: int
    low: int
    high: int
    parts: tuple[tuple[int, int], ...]
    split_tokens: int
    block_tokens: int
    vocab_size: int
    corpus: str
    work: str
    key: str

    @property
    def file(self) -> str:
        """Return the path of the shard under the corpus directory."""
        return f"{self.domain}/{self.split}/shard-{self.number:05d}.arrow"

    @property
    def base(self) -> str:
        """Return the path of the shard's counts, without their endings."""
        return files.join(self.work, self.domain, f"{self.split}-{self.number:05d}")


@dataclass(frozen=True)
class ShardResult:
    """A written shard and the runs of pairs, as (low, high) records of its pairs file."""

    info: ShardInfo
    runs: list[tuple[int, int]]


def plan_shards(
    domain: str,
    split: Split,
    part_tokens: Sequence[int],
    *,
    block_tokens: int,
    vocab_size: int,
    corpus: str,
    work: str,
    key: str,
) -> list[ShardJob]:
    """Return the shards of a split in order; `part_tokens` are the tokens of each part in it."""
    itemsize = token_dtype(vocab_size).itemsize
    # Whole blocks only, so that just the last block of a split can be short.
    shard_tokens = max(1, SHARD_BYTES // itemsize // block_tokens) * block_tokens
    edges = np.cumsum([0, *part_tokens])
    total = int(edges[-1])
    jobs = []
    for number, low in enumerate(range(0, total, shard_tokens)):
        high = min(low + shard_tokens, total)
        # One token more than its own, for the pair that leads into the shard.
        first = int(np.searchsorted(edges, max(low - 1, 0), side="right")) - 1
        last = int(np.searchsorted(edges, high, side="left"))
        parts = tuple((part, int(edges[part])) for part in range(first, last))
        jobs.append(
            ShardJob(
                domain, split, number, low, high, parts, total, block_tokens, vocab_size,
                corpus, work, key,
            )
        )  # fmt: skip
    return jobs


def write_shard(job: ShardJob) -> ShardResult:
    """Return what describes a shard, having written it.

    Raises:
        CorpusError: If the disk is full.
    """
    base = job.parts[0][1]
    # One token of the shard before, so that the pair across the border is counted once.
    before = min(job.low, 1)
    counter = PairCounter(
        job.base + ".pairs",
        job.vocab_size,
        position=job.low - before,
        stride=pair_stride(job.split_tokens),
    )
    try:
        pieces = clip(_stream(job), job.low - before - base, job.high - base)
        counted = _counted(pieces, counter, before)
        dtype = token_dtype(job.vocab_size)
        with ShardWriter(job.corpus, job.file, dtype) as writer:
            for block in cut_blocks(counted, job.block_tokens):
                writer.write(block)
        counts = counter.finish()
    finally:
        counter.abort()
    # Sparse: a shard of a small domain uses few of the vocabulary's tokens.
    token_ids = np.flatnonzero(counts.tokens)
    files.atomic_write_bytes(
        job.base + ".tokens", np.stack([token_ids, counts.tokens[token_ids]]).tobytes()
    )
    return _mark(job, writer.info, counts)


def _mark(job: ShardJob, info: ShardInfo, counts: ShardCounts) -> ShardResult:
    document = {"key": job.key, "info": info.model_dump(), "runs": counts.runs}
    atomic_write_text(job.base + ".json", json.dumps(document))
    return ShardResult(info, counts.runs)


def finished_shard(job: ShardJob) -> ShardResult | None:
    """Return the description of a shard that was written before, or None if it must be done."""
    try:
        stored = parse_json(files.read_bytes(job.base + ".json"))
    except (FileNotFoundError, ValueError):
        return None
    if stored["key"] != job.key or not files.exists(files.join(job.corpus, job.file)):
        return None
    return ShardResult(ShardInfo(**stored["info"]), [(low, high) for low, high in stored["runs"]])


def _counted(
    pieces: Iterator[TokenPiece], counter: PairCounter, before: int
) -> Iterator[TokenPiece]:
    """Yield the pieces less their first `before` tokens, having counted each."""
    for piece in pieces:
        if before:
            head = next(clip([piece], 0, 1))
            counter.add(head, count_tokens=False)
            piece = TokenPiece(piece.tokens[1:], piece.starts[len(head.starts) :] - 1)
            before = 0
        counter.add(piece)
        yield piece


def _stream(job: ShardJob) -> Iterator[TokenPiece]:
    for number, _ in job.parts:
        yield from selected_pieces(job, number)


def selected_pieces(job: ShardJob, number: int) -> Iterator[TokenPiece]:
    """Yield a part's documents of the job's split, a few million tokens at a time."""
    documents = read_documents(job.work, job.domain, number)
    base = part_base(job.work, job.domain, number)
    codes = np.frombuffer(files.read_bytes(base + ".splits"), np.uint8)
    lengths = documents["tokens"].astype(np.int64)
    ends = np.cumsum(lengths)
    rows = np.flatnonzero(codes == CODES[job.split])
    if not len(rows):
        return
    dtype = token_dtype(job.vocab_size)
    # A new chunk begins where the running size passes the next multiple of the chunk's.
    chunk = np.cumsum(lengths[rows]) // _CHUNK_TOKENS
    borders = np.flatnonzero(np.diff(chunk)) + 1
    with files.open_mapped(base + ".tokens") as source:
        for chunk_rows in np.split(rows, borders):
            spans = _spans(ends[chunk_rows] - lengths[chunk_rows], ends[chunk_rows])
            arrays = []
            # Only the selected ranges are read, a small part of the file for the held-out split.
            for low, high in spans:
                source.seek(low * dtype.itemsize)
                arrays.append(
                    np.frombuffer(source.read_buffer((high - low) * dtype.itemsize), dtype)
                )
            tokens = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            starts = np.cumsum(lengths[chunk_rows]) - lengths[chunk_rows]
            yield TokenPiece(tokens, starts)


def _spans(lows: npt.NDArray[np.int64], highs: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the ranges with those that touch joined."""
    gaps = np.flatnonzero(lows[1:] != highs[:-1]) + 1
    for first, end in pairwise([0, *gaps.tolist(), len(lows)]):
        yield int(lows[first]), int(highs[end - 1])


@dataclass(frozen=True)
class EntropyJob:
    """The shards of one split, whose counts are to be added up."""

    shards: tuple[ShardJob, ...]
    runs: tuple[tuple[tuple[int, int], ...], ...]
    vocab_size: int


def entropies(job: EntropyJob) -> tuple[float, float]:
    """Return the unigram and the bigram entropy of a split, nats per token."""
    tokens = np.zeros(job.vocab_size, np.int64)
    for shard in job.shards:
        token_ids, counts = np.frombuffer(
            files.read_bytes(shard.base + ".tokens"), np.int64
        ).reshape(2, -1)
        tokens[token_ids] += counts
    runs = [
        (shard.base + ".pairs", low, high)
        for shard, shard_runs in zip(job.shards, job.runs, strict=True)
        for low, high in shard_runs
    ]
    return unigram_entropy(tokens), bigram_entropy(runs, job.vocab_size)
