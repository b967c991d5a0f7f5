"""litData chunks of `TokensLoader`: `index.json` and `chunk-R-I.bin`.

A chunk is uint32 n, uint32[n + 1] offsets of its items in bytes, and the items, ids end to end.
An item is a document. From `litdata.streaming.{writer,item_loader}` 0.2.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json
from raymix.store.formats.info import (
    EdgesInfo,
    FileStamp,
    TokenFileInfo,
    TokenFileOptions,
    bad_file,
    check_dtype,
    whole_tokens,
)
from raymix.store.formats.token_file import map_file, numbers

# litdata.constants._TORCH_DTYPES_MAPPING, the integers among them.
_TORCH = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32"}
_TORCH |= {17: "int64", 18: "int64", 20: "uint16"}
# litdata.constants._NUMPY_DTYPES_MAPPING, the integers, which come first.
_NUMPY = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def read_index(path: str) -> dict[str, Any]:
    """Return an `index.json`.

    Raises:
        CorpusError: If it is missing or no JSON object.
    """
    try:
        index = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise bad_file(path, f"cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise bad_file(path, "not a JSON object")
    return index


def litdata_files(path: str, options: TokenFileOptions) -> Iterator[TokenFileInfo]:
    """Yield the facts of each chunk that an `index.json` names, in its order.

    Raises:
        CorpusError: If the chunks are compressed, encrypted or not of ids, or one is damaged.
    """
    index = read_index(path)
    config = index.get("config") or {}
    dtype = _dtype(path, config)
    if config.get("compression") or config.get("encryption"):
        raise bad_file(path, "its chunks are compressed or encrypted", fix="write them without")
    for chunk in index.get("chunks") or []:
        name = posixpath.join(posixpath.dirname(path), chunk["filename"])
        yield _chunk(name, chunk, dtype, options)


def _dtype(path: str, config: dict[str, Any]) -> str:
    data_format = config.get("data_format") or []
    name, _, code = str(data_format[0] if len(data_format) == 1 else "").partition(":")
    if name == "no_header_tensor" and code.isdigit():
        return _TORCH.get(int(code), f"of the unknown type {code}")
    if name == "no_header_numpy" and code.isdigit():
        return _NUMPY[int(code)] if int(code) < len(_NUMPY) else f"of the unknown type {code}"
    raise bad_file(
        path,
        f"its items are {data_format}, not one array of ids each",
        allowed="no_header_tensor or no_header_numpy: write it with item_loader=TokensLoader()",
    )


def _chunk(
    path: str, chunk: dict[str, Any], dtype: str, options: TokenFileOptions
) -> TokenFileInfo:
    stamp = FileStamp.of(path)
    items = int(chunk["chunk_size"])
    offset = 4 * (items + 2)
    content = map_file(stamp)
    if len(content) < offset or int(numbers(content, 0, 1, "<u4")[0]) != items:
        raise bad_file(path, f"it does not begin with its {items:,} items and their offsets")
    checked = check_dtype(path, dtype, options)
    tokens = whole_tokens(stamp, offset, checked)
    end = int(numbers(content, 4 * (items + 1), 1, "<u4")[0])
    if end != stamp.size or chunk.get("dim") not in (None, tokens):
        problem = f"it is cut short: {stamp.size:,} bytes, its offsets lead to {end:,}"
        raise bad_file(path, problem)
    return TokenFileInfo(
        format="litdata",
        file=stamp,
        dtype=checked,
        offset=offset,
        tokens=tokens,
        edges=EdgesInfo(
            file=stamp,
            offset=4,
            count=items + 1,
            dtype="<u4",
            origin=offset,
            unit=np.dtype(checked).itemsize,
        ),
        eos_at=options.eos_at or "end",
    )
