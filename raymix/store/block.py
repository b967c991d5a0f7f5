"""The block: the unit of reading and shuffling; one row of one Arrow record batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

TokenArray = npt.NDArray[np.unsignedinteger]
# 32 bits suffice: a block has at most 2**31 tokens.
StartArray = npt.NDArray[np.uint32]


def block_schema(dtype: npt.DTypeLike) -> pa.Schema:
    """Return the Arrow schema of a shard whose token ids have the type `dtype`."""
    return pa.schema(
        [
            pa.field("tokens", pa.large_list(pa.from_numpy_dtype(np.dtype(dtype)))),
            pa.field("starts", pa.large_list(pa.uint32())),
        ]
    )


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive tokens of a split; a document may begin in one block and end in another.

    `tokens` has shape (T,), uint16 or uint32. `starts` has shape (S,), uint32: the sorted
    offsets into `tokens` at which a document begins.
    """

    tokens: TokenArray
    starts: StartArray

    def to_batch(self) -> pa.RecordBatch:
        """Return the block as a record batch of one row, without copying."""
        columns = [_one_row(self.tokens), _one_row(self.starts)]
        return pa.RecordBatch.from_arrays(columns, schema=block_schema(self.tokens.dtype))

    @classmethod
    def from_table(cls, table: pa.Table | pa.RecordBatch, row: int = 0) -> Self:
        """Return the block in row `row` of `table`, without copying."""
        return cls(_values(table.column("tokens"), row), _values(table.column("starts"), row))


def _one_row(values: npt.NDArray[Any]) -> pa.Array:
    # large_list: 64-bit offsets, as a block may hold more than 2**31 bytes of tokens.
    offsets = np.array([0, len(values)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _values(column: pa.Array | pa.ChunkedArray, row: int) -> npt.NDArray[Any]:
    cell = column.slice(row, 1)
    if isinstance(cell, pa.ChunkedArray):
        # A slice of a chunked column keeps its empty chunks.
        cell = next(chunk for chunk in cell.chunks if len(chunk))
    return as_numpy(cell.flatten())


def as_numpy(values: pa.Array) -> npt.NDArray[Any]:
    """Return the values of an array without nulls as a view."""
    # pyarrow's to_numpy imports pandas, which costs every worker most of a second.
    dtype = np.dtype(str(values.type))
    data = values.buffers()[1]
    return np.frombuffer(data, dtype, count=len(values), offset=values.offset * dtype.itemsize)
