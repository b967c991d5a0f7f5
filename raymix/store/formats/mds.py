"""MosaicML streaming (MDS): `index.json` and shards of samples, each of several columns.

A shard is uint32 n, uint32[n + 1] offsets of its samples in bytes, a JSON text, and the samples:
uint32 sizes of the columns of variable size, then the columns in the order of their names. The
ids of a sample are a document. Sizes stand between the ids, so that they cannot be read in place.
From `streaming.base.format.mds` 0.13.
"""

from __future__ import annotations

import posixpath
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymix.store.formats.info import bad_file
from raymix.store.formats.litdata import read_index

_COMPRESSIONS = {"zstd": "zstd", "gz": "gzip", "br": "brotli", "bz2": "bz2"}
# streaming.base.format.mds.encodings.NDArray: types of values, and of the sizes in a shape.
_VALUES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_SHAPES = ("u1", "<u2", "<u4", "<u8")


@dataclass(frozen=True, slots=True)
class MdsShard:
    """One shard: where it is, and how the column of ids lies in its samples."""

    path: str
    compression: str | None
    """pyarrow's name of the compression, None for a raw shard."""
    samples: int
    size: int
    """Bytes of the raw shard."""
    column_sizes: tuple[int | None, ...]
    """Bytes of each column, None where it varies."""
    column: int
    """Number of the column of ids."""
    encoding: str
    """`bytes`, or what follows `ndarray` in the column's encoding."""
    dtype: str | None
    """Type of the ids in `bytes`."""


def mds_shards(path: str, column: str, dtype: str | None) -> list[MdsShard]:
    """Return the shards that an `index.json` names.

    Args:
        path: The `index.json`.
        column: The column of ids.
        dtype: Type of the ids where the column's encoding is `bytes`, which does not tell it.

    Raises:
        CorpusError: If a shard is missing or of another format, or has no such column of ids.
    """
    shards = []
    for entry in read_index(path).get("shards") or []:
        if entry.get("format") != "mds" or entry.get("version") != 2:
            kind = f"{entry.get('format')} version {entry.get('version')}"
            raise bad_file(path, f"its shards are {kind}", allowed="mds version 2 can be read")
        names: list[str] = entry["column_names"]
        if column not in names:
            fix = f"set tokens_column; the columns found are {', '.join(names)}"
            raise bad_file(path, f"it has no column {column!r}", fix=fix)
        at = names.index(column)
        encoding = _encoding(path, entry["column_encodings"][at], column, dtype)
        file, compression = _shard_file(path, entry)
        shards.append(
            MdsShard(
                path=file,
                compression=compression,
                samples=entry["samples"],
                size=entry["raw_data"]["bytes"],
                column_sizes=tuple(entry["column_sizes"]),
                column=at,
                encoding=encoding,
                dtype=dtype,
            )
        )
    if not shards:
        raise bad_file(path, "it names no shard", fix="leave it out")
    return shards


def _encoding(path: str, encoding: str, column: str, dtype: str | None) -> str:
    if encoding == "bytes":
        if dtype is None:
            problem = f"column {column!r} is of bytes, which do not tell the type of an id"
            fix = "set the domain's token_dtype; LLM Foundry writes int64"
            raise bad_file(path, problem, fix=fix)
        return "bytes"
    if encoding.partition(":")[0] != "ndarray":
        allowed = "allowed: bytes, ndarray"
        raise bad_file(path, f"column {column!r} is of type {encoding}", allowed=allowed)
    return encoding.removeprefix("ndarray").removeprefix(":")


def _shard_file(path: str, entry: dict[str, Any]) -> tuple[str, str | None]:
    directory = posixpath.dirname(path)
    raw = posixpath.join(directory, entry["raw_data"]["basename"])
    packed = entry.get("zip_data")
    # Clients keep shards decompressed beside the compressed ones.
    if not packed or Path(raw).is_file():
        return raw, None
    kind = str(entry.get("compression")).partition(":")[0]
    if kind not in _COMPRESSIONS:
        allowed = f"allowed: {', '.join(_COMPRESSIONS)}"
        raise bad_file(path, f"its shards are compressed by {kind}", allowed=allowed)
    return posixpath.join(directory, packed["basename"]), _COMPRESSIONS[kind]


def shard_documents(shard: MdsShard) -> Iterator[npt.NDArray[Any]]:
    """Yield the ids of each sample of a shard.

    Raises:
        CorpusError: If the shard is missing, cut short or damaged.
    """
    content = _content(shard)
    try:
        (samples,) = struct.unpack_from("<I", content)
        offsets = np.frombuffer(content, "<u4", samples + 1, 4)
        if samples != shard.samples or len(content) != shard.size:
            raise ValueError(f"{len(content):,} bytes, {shard.size:,} expected")
        for low, high in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield _ids(shard, content[low:high])
    except (ValueError, struct.error, KeyError, IndexError) as error:
        raise bad_file(shard.path, f"the shard is damaged: {error}") from error


def _content(shard: MdsShard) -> bytes:
    try:
        if shard.compression is None:
            return Path(shard.path).read_bytes()
        with pa.CompressedInputStream(pa.OSFile(shard.path), shard.compression) as source:
            return source.read()
    except (OSError, pa.ArrowException) as error:
        raise bad_file(shard.path, f"cannot be read: {error}") from error


def _ids(shard: MdsShard, sample: bytes) -> npt.NDArray[Any]:
    at = 0
    sizes: list[int] = []
    for size in shard.column_sizes:
        if size is None:
            (size,) = struct.unpack_from("<I", sample, at)
            at += 4
        sizes.append(size)
    low = at + sum(sizes[: shard.column])
    cell = sample[low : low + sizes[shard.column]]
    if len(cell) != sizes[shard.column]:
        raise ValueError("a sample is shorter than its columns")
    if shard.encoding == "bytes":
        return np.frombuffer(cell, np.dtype(shard.dtype).newbyteorder("<"))
    return _ndarray(cell, shard.encoding)


def _ndarray(cell: bytes, encoding: str) -> npt.NDArray[Any]:
    """Return an array; type and shape stand before the values where they are not fixed."""
    dtype, _, shape = encoding.partition(":")
    at = 0
    value = np.dtype(dtype or _VALUES[cell[0]]).newbyteorder("<")
    at += not dtype
    if not shape:
        # One byte: four times the dimensions, plus the type of their sizes.
        dimensions, kind = divmod(cell[at], len(_SHAPES))
        at += 1 + dimensions * np.dtype(_SHAPES[kind]).itemsize
    return np.frombuffer(cell, value, offset=at)
