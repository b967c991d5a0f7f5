"""Facts of a token file: enough to map it and its index again without reading either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from raymix.errors import CorpusError

MappedFormat = Literal["megatron", "olmo", "datatrove", "nanogpt", "llmc", "litdata"]
"""Formats whose tokens lie end to end, so that blocks are views of the files."""

TokenFormat = Literal["megatron", "olmo", "datatrove", "nanogpt", "llmc", "litdata", "mds"]
"""All formats of ready token ids that are not columns of a table."""

EosAt = Literal["end", "start", "none"]
"""Where the end-of-text id stands in a document."""

TokenDtype = Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"]
"""Types of token ids on disk, little-endian."""

_RESTORE = "restore the file, or leave it out"
_AGAIN = "restore it, or prepare again with --if-exists new"


class _FileModel(BaseModel):
    # Stored in manifests: a later minor version may add fields.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class FileStamp(_FileModel):
    """A file, and the size and time by which a change of it is seen."""

    path: str
    """Absolute path, or relative to the corpus directory."""
    size: int
    """Bytes."""
    changed: int
    """Time of the last change, in ns since 1970."""

    @classmethod
    def of(cls, path: str, *, fix: str = _RESTORE) -> FileStamp:
        """Return the stamp of a file as it is now.

        Raises:
            CorpusError: If it is missing.
        """
        try:
            status = Path(path).stat()
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
            raise bad_file(path, problem, fix=fix) from error
        return cls(path=path, size=status.st_size, changed=status.st_mtime_ns)

    def check(self, corpus: str = "") -> None:
        """Check that the file is as it was; a relative path starts at `corpus`.

        Raises:
            CorpusError: If it is missing or has changed.
        """
        path = self.path if self.path.startswith("/") else f"{corpus.rstrip('/')}/{self.path}"
        now = FileStamp.of(path, fix=_AGAIN)
        if (now.size, now.changed) != (self.size, self.changed):
            raise bad_file(
                path,
                f"it has changed since it was indexed ({self.size:,} bytes then, {now.size:,} now)",
                fix=_AGAIN,
            )


class EdgesInfo(_FileModel):
    """A sorted column of integers in a file that gives where documents begin or end."""

    file: FileStamp
    """The file that holds the column."""
    offset: int
    """Bytes before the first number."""
    count: int
    """Numbers."""
    dtype: str
    """NumPy name of their type, such as `<i8`."""
    origin: int = 0
    """The number that stands for token 0."""
    unit: int = 1
    """Difference of two numbers that are one token apart."""


class TokenFileInfo(_FileModel):
    """One token file: consecutive tokens of a domain."""

    format: MappedFormat
    """The format."""
    file: FileStamp
    """The file of token ids."""
    dtype: TokenDtype
    """Type of a token id in the file."""
    offset: int = 0
    """Bytes before the first token."""
    tokens: int
    """Tokens in it."""
    edges: EdgesInfo | None = None
    """The index of its documents that can be mapped, if there is one."""
    text_index: FileStamp | None = None
    """Dolma's index of its documents; with neither, they are found by the end-of-text id."""
    eos_at: EosAt = "end"
    """Where the end-of-text id stands in a document."""
    loss: FileStamp | None = None
    """One byte per token: 1 where it is in the loss."""
    documents: int = 0
    """Documents in it; counted when the corpus is prepared."""
    digest: str = ""
    """Hash of the index and of sampled tokens; computed when the corpus is prepared."""

    @property
    def itemsize(self) -> int:
        """Return the bytes of a token."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class TokenFileOptions:
    """Fields of the recipe about the token files of a domain."""

    vocab_size: int
    """Ids are below this."""
    eos_id: int
    """The end-of-text id."""
    dtype: TokenDtype | None = None
    """Type of ids in files that do not tell it; None: by the format or the vocabulary."""
    eos_at: EosAt | None = None
    """Where the end-of-text id stands; None: by the format."""


def bad_file(path: str, problem: str, *, allowed: str = "", fix: str = _RESTORE) -> CorpusError:
    """Return the error for a token file that cannot be used as it is."""
    return CorpusError.at("file", path, problem, allowed=allowed, fix=fix)


def check_dtype(path: str, dtype: str, options: TokenFileOptions) -> TokenDtype:
    """Return the type of a file's ids if it can hold the vocabulary.

    Raises:
        CorpusError: If not: ids beyond its range were stored modulo 2**bits.
    """
    names: dict[str, TokenDtype] = {name: name for name in _DTYPES}
    if dtype not in names:
        raise bad_file(path, f"its numbers are {dtype}", allowed=f"token ids: {', '.join(names)}")
    largest = int(np.iinfo(np.dtype(dtype)).max)
    if options.vocab_size - 1 > largest:
        raise bad_file(
            path,
            f"its ids are {dtype}, and the tokenizer has {options.vocab_size:,} ids: those above "
            f"{largest:,} were stored as other ids",
            fix="write the file with wider ids, or set corpus.tokenizer to the one that made it",
        )
    return names[dtype]


_DTYPES: tuple[TokenDtype, ...] = ("uint8", "uint16", "uint32", "uint64", "int32", "int64")


def whole_tokens(stamp: FileStamp, offset: int, dtype: str) -> int:
    """Return the number of ids from byte `offset` to the end of a file.

    Raises:
        CorpusError: If there are none, or the last is cut.
    """
    tokens, rest = divmod(stamp.size - offset, np.dtype(dtype).itemsize)
    if tokens <= 0:
        raise bad_file(stamp.path, "it holds no token", fix="leave it out")
    if rest:
        raise bad_file(
            stamp.path,
            f"it is cut short: {stamp.size - offset:,} bytes are no whole number of {dtype} ids",
            fix="restore the file, or set the domain's token_dtype",
        )
    return tokens
