"""Entropies of a split: exact counts of tokens and of pairs, in bounded memory.

Pairs are (token, next token) within a document; the pair of a document's last token with the
next document's first is left out, since documents are kept apart. Each shard writes its pair
counts as sorted runs; the runs are merged range by range. Splits of more than 2**28 tokens count
the pairs of every k-th stretch of 2**22 tokens, evenly spaced, which bounds disk and time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raymix.corpus.passes.cut import TokenPiece
from raymix.store.remote import files

STRETCH_TOKENS = 1 << 22
"""Tokens whose pairs are counted at a time: 4 million."""

MAX_PAIRS = 1 << 28
"""Tokens of a split up to which every pair is counted."""

_RUN = np.dtype([("pair", "<u8"), ("count", "<u4")])
_MERGE_RECORDS = 1 << 22
_SAMPLES = 256

Counts = npt.NDArray[np.int64]
Run = npt.NDArray[np.void]


def pair_stride(split_tokens: int) -> int:
    """Return k: the pairs of every k-th stretch are counted."""
    return max(1, math.ceil(split_tokens / MAX_PAIRS))


@dataclass
class ShardCounts:
    """Counts of one shard: tokens (V,), and runs of pairs as (low, high) records of its file."""

    tokens: Counts
    runs: list[tuple[int, int]]


class PairCounter:
    """Counts the tokens and pairs of a shard as its pieces go by."""

    def __init__(self, url: str, vocab_size: int, *, position: int, stride: int) -> None:
        """Write runs to `url`; the first token to come stands at `position` in the split."""
        self._file = files.AtomicFile(url)
        self._counts = ShardCounts(np.zeros(vocab_size, np.int64), [])
        self._position = position
        self._stride = stride
        self._last: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._pending: list[npt.NDArray[np.uint64]] = []
        self._size = self._written = 0

    def add(self, piece: TokenPiece, *, count_tokens: bool = True) -> None:
        """Count a piece, and the pair that leads into it from the piece before."""
        if count_tokens:
            self._counts.tokens += np.bincount(
                piece.tokens, minlength=len(self._counts.tokens)
            ).astype(np.int64)
        for low in range(0, len(piece.tokens), STRETCH_TOKENS):
            self._add_stretch(piece, low, min(low + STRETCH_TOKENS, len(piece.tokens)))

    def _add_stretch(self, piece: TokenPiece, low: int, high: int) -> None:
        begin = self._position
        self._position += high - low
        tokens = np.concatenate([self._last, piece.tokens[low:high].astype(np.uint64)])
        self._last = tokens[-1:]
        first = begin + 1 - (len(tokens) - (high - low))  # position of the first pair's second
        pairs = (tokens[:-1] << np.uint64(32)) | tokens[1:]
        is_counted = (np.arange(first, first + len(pairs)) // STRETCH_TOKENS) % self._stride == 0
        borders = np.searchsorted(piece.starts, [low, high])
        starts = piece.starts[borders[0] : borders[1]] - low + begin - first
        # A pair whose second token starts a document joins two documents: not counted.
        is_counted[starts[(starts >= 0) & (starts < len(pairs))]] = False
        self._pending.append(pairs[is_counted])
        self._size += len(self._pending[-1])
        if self._size >= STRETCH_TOKENS:
            self._write_run()

    def _write_run(self) -> None:
        if not self._size:
            return
        # Sorted and counted in memory: a run has far fewer records than the pairs it counts.
        pairs, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        run = np.empty(len(pairs), dtype=_RUN)
        run["pair"], run["count"] = pairs, counts
        self._file.write(run.tobytes())
        self._counts.runs.append((self._written, self._written + len(run)))
        self._written += len(run)
        self._pending.clear()
        self._size = 0

    def finish(self) -> ShardCounts:
        """Return the counts, having written the last run."""
        self._write_run()
        self._file.commit()
        return self._counts

    def abort(self) -> None:
        """Leave nothing behind, unless finished."""
        self._file.abort()


def unigram_entropy(tokens: Counts) -> float:
    """Return the entropy of token counts (V,), nats per token."""
    total = int(tokens.sum())
    return _spread(tokens, total) / total if total else 0.0


def bigram_entropy(runs: Sequence[tuple[str, int, int]], vocab_size: int) -> float:
    """Return the entropy of the next token given the current one, nats per token.

    H(next | current) = (sum over current of C log C - sum over pairs of c log c) / pairs, where
    c counts a pair and C all pairs with the same current token.

    Args:
        runs: File and records [low, high) of every sorted run of the split.
        vocab_size: Ids are below this.
    """
    currents = np.zeros(vocab_size, np.int64)
    within = 0.0
    for pairs, counts in _merged(runs):
        within += _plain_spread(counts)
        # add.at, not indexing: a token is the first of many pairs, and indexing would add once.
        np.add.at(currents, (pairs >> np.uint64(32)).astype(np.int64), counts)
    total = int(currents.sum())
    # The difference of two sums of rounding errors can end a hair below zero.
    return max(0.0, (_plain_spread(currents) - within) / total) if total else 0.0


def _spread(counts: Counts, total: int) -> float:
    return total * math.log(total) - _plain_spread(counts)


def _plain_spread(counts: Counts) -> float:
    positive = counts[counts > 0].astype(np.float64)
    return float((positive * np.log(positive)).sum())


def _merged(
    runs: Sequence[tuple[str, int, int]],
) -> Iterator[tuple[npt.NDArray[np.uint64], Counts]]:
    """Yield all pairs with their total counts, in ascending ranges of about 4 million records."""
    if not runs:
        return
    mapped = [_map_run(*run) for run in runs]
    for low, high in _ranges([run["pair"] for run in mapped]):
        range_records = [run[slice(*np.searchsorted(run["pair"], [low, high]))] for run in mapped]
        records = np.concatenate(range_records)
        if len(records):
            pairs, places = np.unique(records["pair"], return_inverse=True)
            weights = np.bincount(places, weights=records["count"]).astype(np.int64)
            yield pairs, weights


def _map_run(url: str, low: int, high: int) -> Run:
    with files.open_mapped(url) as source:
        source.seek(low * _RUN.itemsize)
        return np.frombuffer(source.read_buffer((high - low) * _RUN.itemsize), dtype=_RUN)


def _ranges(runs: Iterable[npt.NDArray[np.uint64]]) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Yield ranges [low, high) of pairs that hold about `_MERGE_RECORDS` records each."""
    runs = list(runs)
    total = sum(map(len, runs))
    # The ranges come from samples of every run, so each holds about as many records although
    # pairs are far from uniform over their 64 bits.
    samples = [run[:: max(1, len(run) // _SAMPLES)] for run in runs if len(run)]
    range_count = max(1, total // _MERGE_RECORDS)
    edges = np.empty(0, np.uint64)
    if range_count > 1:
        pooled = np.sort(np.concatenate(samples))
        edges = np.unique(pooled[np.arange(1, range_count) * len(pooled) // range_count])
    lows = [np.uint64(0), *edges]
    highs = [*edges, np.uint64(2**64 - 1)]
    yield from zip(lows, highs, strict=True)
