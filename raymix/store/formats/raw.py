"""Raw ids without an index of their own: nanoGPT's and llm.c's `.bin`, and OLMo's `.npy`.

nanoGPT writes uint16 ids and nothing else. llm.c and modded-nanogpt put 256 int32 in front: a
magic number, the version, the number of ids. OLMo's `.npy` (Dolma) is no NumPy file but raw ids,
with `NAME.csv.gz` beside it, lines `start,end,...` in ids; a `.npy` that *is* a NumPy file is
read as well. Without an index, documents are found by the end-of-text id.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from raymix.store.formats.info import (
    EosAt,
    FileStamp,
    MappedFormat,
    TokenFileInfo,
    TokenFileOptions,
    bad_file,
    check_dtype,
    whole_tokens,
)
from raymix.store.formats.text_index import document_ends
from raymix.store.formats.token_file import map_file, numbers
from raymix.store.manifest import token_dtype

NUMPY_MAGIC = b"\x93NUMPY"
LLMC_HEADER_BYTES = 1024
# Magic number and version: GPT-2's ids, and Llama 3's (llm.c/dev/data/data_common.py).
_LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


def nanogpt_file(path: str, options: TokenFileOptions) -> TokenFileInfo:
    """Return the facts of a file of raw ids, uint16 unless the recipe says otherwise.

    Raises:
        CorpusError: If it is empty or cut short.
    """
    dtype = check_dtype(path, options.dtype or "uint16", options)
    return _raw("nanogpt", FileStamp.of(path), dtype, 0, options, "end")


def llmc_magic(head: bytes) -> str | None:
    """Return `little` or `big` if the first bytes of a file are llm.c's, else None."""
    for order in ("<", ">"):
        if len(head) >= 4 and int(np.frombuffer(head[:4], f"{order}i4")[0]) in _LLMC:
            return "little" if order == "<" else "big"
    return None


def llmc_file(path: str, options: TokenFileOptions) -> TokenFileInfo:
    """Return the facts of a file of llm.c or modded-nanogpt.

    Their documents begin with the end-of-text id, and go on from one file to the next.

    Raises:
        CorpusError: If the header is not llm.c's, or the file is not as long as it says.
    """
    stamp = FileStamp.of(path)
    content = map_file(stamp)
    order = llmc_magic(content[:4].tobytes())
    if order is None or len(content) < LLMC_HEADER_BYTES:
        allowed = f"its first number is {' or '.join(map(str, _LLMC))}"
        raise bad_file(path, "it does not begin with llm.c's header", allowed=allowed)
    if order == "big":
        raise bad_file(path, "its numbers are big-endian", allowed="little-endian can be read")
    magic, version, tokens = numbers(content, 0, 3, "<i4").tolist()
    known, dtype = _LLMC[magic]
    if version != known:
        raise bad_file(path, f"it has version {version}", allowed=f"version {known} can be read")
    info = _raw(
        "llmc", stamp, check_dtype(path, dtype, options), LLMC_HEADER_BYTES, options, "start"
    )
    if info.tokens != tokens:
        problem = f"its header says {tokens:,} tokens, the file holds {info.tokens:,}"
        raise bad_file(path, problem)
    return info


def olmo_file(path: str, options: TokenFileOptions) -> TokenFileInfo:
    """Return the facts of a `.npy` of Dolma, or of a NumPy file of ids.

    Raises:
        CorpusError: If it is empty, cut short, not one row of ids, or not what its index says.
    """
    stamp = FileStamp.of(path)
    if not stamp.size:
        raise bad_file(path, "the file is empty", fix="leave it out")
    with open(path, "rb") as file:
        if file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            return _numpy_file(stamp, options)
    index = Path(path.removesuffix(".npy") + ".csv.gz")
    index_stamp = FileStamp.of(str(index)) if index.is_file() else None
    ends = None if index_stamp is None else document_ends(index_stamp)
    dtype = options.dtype or _olmo_dtype(stamp, ends, options)
    info = _raw("olmo", stamp, check_dtype(path, dtype, options), 0, options, "end")
    last = info.tokens if ends is None else int(ends[-1]) if len(ends) else 0
    if last != info.tokens:
        problem = f"its index ends at token {last:,}, the file of {dtype} at {info.tokens:,}"
        raise bad_file(path, problem, fix="restore both, or set the domain's token_dtype")
    return info.model_copy(update={"text_index": index_stamp})


def _olmo_dtype(
    stamp: FileStamp, ends: npt.NDArray[np.int64] | None, options: TokenFileOptions
) -> str:
    if ends is not None and len(ends) and ends[-1]:
        # The index counts ids and the file bytes, so together they tell the width.
        for dtype in ("uint16", "uint32", "uint8", "uint64"):
            if int(ends[-1]) * np.dtype(dtype).itemsize == stamp.size:
                return dtype
    return token_dtype(options.vocab_size).name


def _numpy_file(stamp: FileStamp, options: TokenFileOptions) -> TokenFileInfo:
    with open(stamp.path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise bad_file(stamp.path, f"its NumPy header is damaged: {error}") from error
        offset = file.tell()
    if dtype.byteorder == ">":
        problem = "its numbers are big-endian"
        raise bad_file(stamp.path, problem, allowed="little-endian can be read")
    if len(shape) != 1:
        raise bad_file(stamp.path, f"it has the shape {shape}", allowed="one row of ids")
    checked = check_dtype(stamp.path, dtype.name, options)
    info = _raw("olmo", stamp, checked, offset, options, "start")
    if info.tokens != shape[0]:
        problem = f"its header says {shape[0]:,} tokens, the file holds {info.tokens:,}"
        raise bad_file(stamp.path, problem)
    return info


def _raw(
    kind: MappedFormat,
    stamp: FileStamp,
    dtype: str,
    offset: int,
    options: TokenFileOptions,
    eos_at: EosAt,
) -> TokenFileInfo:
    return TokenFileInfo(
        format=kind,
        file=stamp,
        dtype=check_dtype(stamp.path, dtype, options),
        offset=offset,
        tokens=whole_tokens(stamp, offset, dtype),
        eos_at=options.eos_at or eos_at,
    )
