"""Columns of whole numbers, each in an Arrow IPC file of its own, written in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymix.store.block import as_numpy
from raymix.store.remote import files


def write_numbers(
    url: str, name: str, dtype: npt.DTypeLike, pieces: Iterable[npt.NDArray[Any]]
) -> str:
    """Write a column that comes in pieces, and return the hash of the file's bytes.

    Raises:
        CorpusError: If the disk is full.
    """
    schema = _schema(name, dtype)
    with (
        files.AtomicFile(url) as file,
        pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer,
    ):
        for piece in pieces:
            values = pa.array(np.ascontiguousarray(piece, dtype=dtype))
            writer.write_batch(pa.RecordBatch.from_arrays([values], schema=schema))
    return file.sha256.hexdigest()


def read_numbers(url: str, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return what `write_numbers` wrote, shape (N,); a view of the file where it is one piece.

    Raises:
        OSError: If the file is absent or not an Arrow file.
        ValueError: If it holds something else.
    """
    reader = pa.ipc.open_file(files.open_mapped(url))
    if reader.schema != _schema(name, dtype):
        raise ValueError(f"columns {reader.schema.names}, not {name} of {np.dtype(dtype)}")
    column = reader.read_all().column(name)
    pieces = [as_numpy(chunk) for chunk in column.chunks if len(chunk)]
    return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, dtype)])


def write_lengths(url: str, pieces: Iterable[npt.NDArray[np.integer]]) -> None:
    """Write the tokens of each document of a split, in the stream's order.

    Raises:
        CorpusError: If the disk is full.
    """
    write_numbers(url, "length", np.uint32, pieces)


def read_lengths(url: str) -> npt.NDArray[np.uint32]:
    """Return what `write_lengths` wrote, shape (documents,).

    Raises:
        OSError: If the file is absent or not an Arrow file.
        ValueError: If it holds something else.
    """
    return read_numbers(url, "length", np.uint32)


def _schema(name: str, dtype: npt.DTypeLike) -> pa.Schema:
    return pa.schema([pa.field(name, pa.from_numpy_dtype(np.dtype(dtype)))])
