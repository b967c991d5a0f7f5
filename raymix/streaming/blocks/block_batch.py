"""Slabs: tokens of some blocks in one piece of memory, as a worker holds them.

A slab is a view of the object store or of a mapped file. In packed mode its blocks are cut to
whole rows, so that all its rows form one matrix, and a batch is gathered from few slabs.
Letters: K blocks, T tokens, S document starts, N rows, L tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymix.store import Block
from raymix.store.block import as_numpy

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class BlockBatch:
    """Some blocks one after the other."""

    numbers: list[int]
    """Global numbers of the blocks, K of them."""
    first_K: Ints
    """Where in `tokens` each begins."""
    tokens: Tokens
    """Their tokens, shape (T,)."""
    starts: Ints
    """Where in `tokens` documents begin, sorted, shape (S,)."""
    row_tokens: int
    """Tokens per row, L; 1 where blocks are not cut to rows."""

    @cached_property
    def rows_NL(self) -> Tokens:
        """Return the tokens as rows, shape (N, L)."""
        return self.tokens.reshape(-1, self.row_tokens)

    @cached_property
    def start_range(self) -> Ints:
        """Return where in `starts` those of each row begin, shape (N + 1,)."""
        return np.searchsorted(self.starts, np.arange(len(self.rows_NL) + 1) * self.row_tokens)

    @cached_property
    def offsets(self) -> Ints:
        """Return `starts` counted from the beginning of the row, shape (S,)."""
        return self.starts % self.row_tokens

    @cached_property
    def labels_N(self) -> Ints:
        """Return how many tokens of each row have a label: the next token of their document."""
        inside = np.concatenate([[0], np.cumsum(self.offsets > 0)])
        return self.row_tokens - 1 - np.diff(inside[self.start_range])


def make_block_batch(
    numbers: Sequence[int], blocks: Sequence[Block], row_tokens: int
) -> BlockBatch:
    """Return `blocks` as one slab, each cut to whole rows; a single block is not copied."""
    sizes = np.array([len(block.tokens) // row_tokens * row_tokens for block in blocks])
    first_K = np.cumsum(sizes, dtype=np.int64) - sizes
    tokens = [block.tokens[:size] for block, size in zip(blocks, sizes, strict=True)]
    starts = [
        block.starts[block.starts < size].astype(np.int64) + first
        for block, size, first in zip(blocks, sizes, first_K, strict=True)
    ]
    return BlockBatch(
        numbers=list(numbers),
        first_K=first_K,
        tokens=tokens[0] if len(tokens) == 1 else np.concatenate(tokens),
        starts=np.concatenate(starts),
        row_tokens=row_tokens,
    )


def to_table(slab: BlockBatch, errors: Sequence[str | None]) -> pa.Table:
    """Return a slab as a table of one row per block; all tokens are one buffer."""
    first_K = np.append(slab.first_K, len(slab.tokens))
    starts_K = np.searchsorted(slab.starts, first_K)
    return pa.table(
        {
            "number": pa.array(slab.numbers, pa.int64()),
            "tokens": pa.LargeListArray.from_arrays(pa.array(first_K), pa.array(slab.tokens)),
            "starts": pa.LargeListArray.from_arrays(
                pa.array(starts_K.astype(np.int64)), pa.array(slab.starts)
            ),
            "error": pa.array(errors, pa.string()),
        }
    )


def from_table(table: pa.Table, row_tokens: int) -> tuple[BlockBatch, dict[int, str]]:
    """Return the slab of a table without copying, and what went wrong with which block."""
    numbers: list[int] = table.column("number").to_pylist()
    errors = {
        number: error
        for number, error in zip(numbers, table.column("error").to_pylist(), strict=True)
        if error is not None
    }
    tokens, starts = (_one(table.column(name)) for name in ("tokens", "starts"))
    good = [at for at, number in enumerate(numbers) if number not in errors]
    slab = BlockBatch(
        numbers=[numbers[at] for at in good],
        first_K=as_numpy(tokens.offsets)[:-1][good],
        tokens=as_numpy(tokens.values),
        starts=as_numpy(starts.values),
        row_tokens=row_tokens,
    )
    return slab, errors


def _one(column: pa.ChunkedArray) -> pa.LargeListArray:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
