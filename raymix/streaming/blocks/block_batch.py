"""Block batches: the tokens of several blocks in one contiguous array.

A batch is a view of the object store or of a mapped file. In packed mode its blocks are cut to
whole rows, so that all its rows form one matrix and a step's rows are copied from few arrays.
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


# Without slots: cached_property stores its value in the instance's __dict__.
@dataclass(frozen=True)
class BlockBatch:
    """Blocks concatenated into one array of tokens."""

    numbers: list[int]
    """Global numbers of the K blocks."""
    first_K: Ints
    """Offset of each block's first token in `tokens`, shape (K,)."""
    tokens: Tokens
    """Token ids of all blocks, shape (T,)."""
    starts: Ints
    """Offsets in `tokens` at which documents begin, sorted, shape (S,)."""
    row_tokens: int
    """Tokens per row, L; 1 where blocks are not cut to rows."""

    @cached_property
    def rows_NL(self) -> Tokens:
        """Return the tokens as rows, shape (N, L)."""
        return self.tokens.reshape(-1, self.row_tokens)

    @cached_property
    def start_range(self) -> Ints:
        """Return the offsets in `starts` of the rows' document starts, shape (N + 1,)."""
        return np.searchsorted(self.starts, np.arange(len(self.rows_NL) + 1) * self.row_tokens)

    @cached_property
    def offsets(self) -> Ints:
        """Return `starts` relative to the beginning of their row, shape (S,)."""
        return self.starts % self.row_tokens

    @cached_property
    def labels_N(self) -> Ints:
        """Return the number of labels in each row: tokens followed by one of their document."""
        # L - 1 tokens have a successor in the row, less those whose successor starts a document.
        # A start at offset 0 has no predecessor in the row and costs no label.
        inside = np.concatenate([[0], np.cumsum(self.offsets > 0)])
        return self.row_tokens - 1 - np.diff(inside[self.start_range])


def make_block_batch(
    numbers: Sequence[int], blocks: Sequence[Block], row_tokens: int
) -> BlockBatch:
    """Return `blocks` as one batch, each cut to whole rows; a single block is not copied."""
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


def to_table(batch: BlockBatch, errors: Sequence[str | None]) -> pa.Table:
    """Return a batch as an Arrow table with one row per block; all tokens are in one buffer."""
    first_K = np.append(batch.first_K, len(batch.tokens))
    starts_K = np.searchsorted(batch.starts, first_K)
    return pa.table(
        {
            "number": pa.array(batch.numbers, pa.int64()),
            # Large lists have 64-bit offsets; those of plain lists end at 2**31 tokens.
            "tokens": pa.LargeListArray.from_arrays(pa.array(first_K), pa.array(batch.tokens)),
            "starts": pa.LargeListArray.from_arrays(
                pa.array(starts_K.astype(np.int64)), pa.array(batch.starts)
            ),
            "error": pa.array(errors, pa.string()),
        }
    )


def from_table(table: pa.Table, row_tokens: int) -> tuple[BlockBatch, dict[int, str]]:
    """Return a table's readable blocks, without copying, and the errors by block number."""
    numbers: list[int] = table.column("number").to_pylist()
    errors = {
        number: error
        for number, error in zip(numbers, table.column("error").to_pylist(), strict=True)
        if error is not None
    }
    tokens, starts = (_single_chunk(table.column(name)) for name in ("tokens", "starts"))
    # A corrupt block is empty, so leaving it out leaves the offsets of the others valid.
    readable = [at for at, number in enumerate(numbers) if number not in errors]
    batch = BlockBatch(
        numbers=[numbers[at] for at in readable],
        first_K=as_numpy(tokens.offsets)[:-1][readable],
        tokens=as_numpy(tokens.values),
        starts=as_numpy(starts.values),
        row_tokens=row_tokens,
    )
    return batch, errors


def _single_chunk(column: pa.ChunkedArray) -> pa.LargeListArray:
    # combine_chunks copies, even a single chunk.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
