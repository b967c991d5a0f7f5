"""Megatron-LM: `NAME.bin` holds the ids end to end, `NAME.idx` the sequences and documents.

The index is little-endian: `MMIDIDX` and two zero bytes, uint64 version 1, uint8 type of the ids,
uint64 number of sequences S, uint64 number of document entries D; int32[S] lengths, int64[S]
offsets in bytes, int64[D] the first sequence of each document and S; maybe int8[S] modes. From
`megatron.core.datasets.indexed_dataset` 0.16. A document is a sequence, as for Megatron's
`GPTDataset`; the document entries group sequences for BERT.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raymix.store.formats.info import (
    EdgesInfo,
    EosAt,
    FileStamp,
    TokenFileInfo,
    TokenFileOptions,
    bad_file,
    check_dtype,
)
from raymix.store.formats.token_file import map_file, numbers

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_CHUNK = 1 << 20


def index_path(path: str) -> str:
    """Return the path of the index beside a `.bin` file."""
    return path.removesuffix(".bin") + ".idx"


def megatron_file(path: str, options: TokenFileOptions) -> TokenFileInfo:
    """Return the facts of the pair `path` (.bin) and its .idx, from the index' header.

    Raises:
        CorpusError: If the index is missing, damaged, or of another file.
    """
    stamp = FileStamp.of(path)
    if not Path(index_path(path)).is_file():
        problem = f"its index {index_path(path)} is missing"
        raise bad_file(path, problem, fix="restore it, or set format: nanogpt for ids without one")
    index = FileStamp.of(index_path(path))
    content = map_file(index)
    if len(content) < _HEADER.size or content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise bad_file(index.path, "not a Megatron index", allowed="it begins with MMIDIDX")
    _, version, code, sequences, entries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if version != 1:
        swapped = int.from_bytes(version.to_bytes(8, "little"), "big") == 1
        problem = "its numbers are big-endian" if swapped else f"it has version {version}"
        raise bad_file(index.path, problem, allowed="version 1, little-endian, can be read")
    dtype = check_dtype(path, _DTYPES.get(code, f"of the unknown type {code}"), options)
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if len(content) not in (expected, expected + sequences):
        problem = f"it is cut short or too long: {len(content):,} bytes, {expected:,} expected"
        raise bad_file(index.path, problem)
    ends = numbers(content, expected - 8 * entries, entries, "<i8")[[0, -1]] if entries else (0, 0)
    if tuple(ends) != (0, sequences):
        raise bad_file(index.path, f"its documents do not span its {sequences:,} sequences")
    if np.any(content[expected:]):
        raise bad_file(index.path, "it holds sequences of several modes, which are not all tokens")
    if not sequences or not stamp.size:
        raise bad_file(path, "it holds no token", fix="leave it out")
    edges, tokens = _edges(index, content, sequences, np.dtype(dtype).itemsize)
    if tokens * np.dtype(dtype).itemsize != stamp.size:
        side = "past the end of" if tokens * np.dtype(dtype).itemsize > stamp.size else "short of"
        problem = f"its index leads to token {tokens:,}, {side} the file of {stamp.size:,} bytes"
        raise bad_file(path, problem, fix="restore both, .bin and .idx are of one run")
    eos_at: EosAt = options.eos_at or "end"
    return TokenFileInfo(
        format="megatron", file=stamp, dtype=dtype, tokens=tokens, edges=edges, eos_at=eos_at
    )


def _edges(
    index: FileStamp, content: npt.NDArray[np.uint8], sequences: int, itemsize: int
) -> tuple[EdgesInfo, int]:
    """Return the offsets of the sequences as document edges, and the tokens that they span."""
    offsets = _HEADER.size + 4 * sequences
    last_length = int(numbers(content, offsets - 4, 1, "<i4")[0])
    last_offset = int(numbers(content, offsets + 8 * (sequences - 1), 1, "<i8")[0])
    if last_offset % itemsize or last_offset < 0 or last_length < 0:
        raise bad_file(index.path, f"its last sequence is at byte {last_offset:,}")
    edges = EdgesInfo(file=index, offset=offsets, count=sequences, dtype="<i8", unit=itemsize)
    return edges, last_offset // itemsize + last_length


def check_sequences(info: TokenFileInfo) -> None:
    """Check that the sequences of an index follow each other from the start of the file on.

    Raises:
        CorpusError: If one has a negative length, or they overlap or leave gaps.
    """
    assert info.edges is not None
    index, sequences, itemsize = info.edges.file, info.edges.count, info.itemsize
    content = map_file(index)
    lengths = numbers(content, _HEADER.size, sequences, "<i4")
    offsets = numbers(content, info.edges.offset, sequences, "<i8")
    end = 0
    for low in range(0, sequences, _CHUNK):
        part = lengths[low : low + _CHUNK].astype(np.int64)
        if part.min() < 0:
            raise bad_file(index.path, f"a sequence has the length {part.min()}")
        ends = end + np.cumsum(part) * itemsize
        begins = ends - part * itemsize
        wrong = np.flatnonzero(offsets[low : low + _CHUNK] != begins)
        if len(wrong):
            at = low + int(wrong[0])
            problem = f"sequence {at:,} is at byte {offsets[at]:,}, {begins[wrong[0]]:,} expected"
            raise bad_file(index.path, problem)
        end = int(ends[-1])
