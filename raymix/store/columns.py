"""Integer columns, one per Arrow IPC file, written in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymix.store.block import as_numpy
from raymix.store.remote import files


def write_numbers(
    url: str, name: str, dtype: npt.DTypeLike, chunks: Iterable[npt.NDArray[Any]]
) -> str:
    """Write a column from chunks, and return the hash of the file's bytes.

    Raises:
        CorpusError: If the disk is full.
    """
    schema = _schema(name, dtype)
    with (
        files.AtomicFile(url) as file,
        pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer,
    ):
        for chunk in chunks:
            # Arrow takes a contiguous NumPy array without copying, a strided one value by value.
            values = pa.array(np.ascontiguousarray(chunk, dtype=dtype))
            writer.write_batch(pa.RecordBatch.from_arrays([values], schema=schema))
    return file.sha256.hexdigest()


def read_numbers(url: str, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the column that `write_numbers` wrote, shape (N,); a view of the file if possible.

    Raises:
        OSError: If the file is absent or not an Arrow file.
        ValueError: If it holds something else.
    """
    reader = pa.ipc.open_file(files.open_mapped(url))
    # A file of another column would be read as numbers just the same.
    if reader.schema != _schema(name, dtype):
        raise ValueError(f"columns {reader.schema.names}, not {name} of {np.dtype(dtype)}")
    column = reader.read_all().column(name)
    parts = [as_numpy(chunk) for chunk in column.chunks if len(chunk)]
    # One part stays a view of the mapped file; the empty array gives no parts a dtype.
    return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, dtype)])


def write_lengths(url: str, chunks: Iterable[npt.NDArray[np.integer]]) -> None:
    """Write the tokens of each document of a split, in the stream's order.

    Raises:
        CorpusError: If the disk is full.
    """
    write_numbers(url, "length", np.uint32, chunks)


def read_lengths(url: str) -> npt.NDArray[np.uint32]:
    """Return what `write_lengths` wrote, shape (documents,).

    Raises:
        OSError: If the file is absent or not an Arrow file.
        ValueError: If it holds something else.
    """
    return read_numbers(url, "length", np.uint32)


def _schema(name: str, dtype: npt.DTypeLike) -> pa.Schema:
    # The name is part of the check: lengths and edges are both integers.
    return pa.schema([pa.field(name, pa.from_numpy_dtype(np.dtype(dtype)))])
