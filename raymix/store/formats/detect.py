"""Detection of a token file's format by its name, its neighbors and its first bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raymix.errors import CorpusError
from raymix.store.formats.datatrove import datatrove_file
from raymix.store.formats.info import MappedFormat, TokenFileInfo, TokenFileOptions, TokenFormat
from raymix.store.formats.litdata import litdata_files, read_index
from raymix.store.formats.megatron import check_sequences, index_path, megatron_file
from raymix.store.formats.raw import llmc_file, llmc_magic, nanogpt_file, olmo_file

INDEX_JSON = "index.json"
"""Name of the file that stands for a directory of MDS or litData."""

# Index files, which a glob over a directory matches beside the tokens.
_COMPANIONS = (".idx", ".csv.gz", ".ds.index", ".ds.loss", ".ds.metadata", ".mds", ".mds.zstd")

_PARSERS: dict[MappedFormat, Callable[[str, TokenFileOptions], TokenFileInfo]] = {
    "megatron": megatron_file,
    "olmo": olmo_file,
    "datatrove": datatrove_file,
    "nanogpt": nanogpt_file,
    "llmc": llmc_file,
}
MAPPED: tuple[MappedFormat, ...] = ("megatron", "olmo", "datatrove", "nanogpt", "llmc", "litdata")
"""Formats that can be read in place."""


def named_file(path: str, file_format: TokenFormat) -> str:
    """Return the file that a user's name for a data set means: Megatron's prefix, a directory."""
    if file_format in ("mds", "litdata") and not path.endswith(".json"):
        return f"{path.rstrip('/')}/{INDEX_JSON}"
    if file_format == "megatron" and not path.endswith(".bin"):
        return path.removesuffix(".idx") + ".bin"
    return path


def is_companion(path: str) -> bool:
    """Return whether a file is the index of token files and not one itself."""
    name = path.rsplit("/", 1)[-1]
    litdata_chunk = name.startswith("chunk-") and name.endswith(".bin")
    if litdata_chunk or name.endswith(_COMPANIONS):
        # `.idx` and `.csv.gz` mean other things elsewhere: only beside their tokens.
        return any(Path(sibling).is_file() for sibling in _tokens_of(path))
    return False


def _tokens_of(path: str) -> Iterator[str]:
    directory = path.rpartition("/")[0] or "."
    for ending, tokens in ((".idx", ".bin"), (".csv.gz", ".npy"), (".ds.index", ".ds")):
        if path.endswith(ending):
            yield path.removesuffix(ending) + tokens
    for ending in (".ds.loss", ".ds.metadata"):
        if path.endswith(ending):
            yield path.removesuffix(ending) + ".ds"
    if path.endswith((".mds", ".mds.zstd", ".bin")):
        yield f"{directory}/{INDEX_JSON}"


def detect(path: str) -> TokenFormat | None:
    """Return the format of a token file, or None where the file does not tell."""
    if path.endswith(".npy"):
        return "olmo"
    if path.endswith(".ds"):
        return "datatrove"
    if path.endswith(f"/{INDEX_JSON}"):
        # JSON Lines may have this name, too.
        index: dict[str, Any] = {}
        with contextlib.suppress(CorpusError):
            index = read_index(path)
        return "mds" if "shards" in index else "litdata" if "chunks" in index else None
    if path.endswith(".bin"):
        if Path(index_path(path)).is_file():
            return "megatron"
        with open(path, "rb") as file:
            return "llmc" if llmc_magic(file.read(4)) else None
    return None


def token_files(
    path: str, file_format: MappedFormat, options: TokenFileOptions
) -> list[TokenFileInfo]:
    """Return the facts of the token files that `path` stands for, from their indices.

    Raises:
        CorpusError: If a file or its index is missing, damaged, or cannot hold the vocabulary.
    """
    if file_format == "litdata":
        return list(litdata_files(path, options))
    info = _PARSERS[file_format](path, options)
    if file_format == "megatron":
        check_sequences(info)
    return [info]
