"""A mapped token file: any range of its tokens, and the documents that begin in a range."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raymix.errors import CorpusError
from raymix.store.block import TokenArray
from raymix.store.formats.info import (
    EdgesInfo,
    FileStamp,
    TokenFileInfo,
    TokenFileOptions,
    bad_file,
)
from raymix.store.formats.text_index import document_ends
from raymix.store.remote import files

Ints = npt.NDArray[np.int64]

# 8 MB of an index at a time: the memory of a scan does not grow with the documents.
_CHUNK_EDGES = 1 << 20
# 4 or 8 MB of tokens searched at a time for the end of a document.
_CHUNK_TOKENS = 1 << 21


def map_file(stamp: FileStamp, corpus: str = "") -> npt.NDArray[np.uint8]:
    """Return the bytes of a file as a read-only view of its mapping.

    Args:
        stamp: The file; a relative path starts at `corpus`.
        corpus: Path of the corpus directory.

    Raises:
        CorpusError: If it is missing, or not the file that the stamp was taken of.
    """
    stamp.check(corpus)
    path = stamp.path if stamp.path.startswith("/") else files.join(corpus, stamp.path)
    if not stamp.size:
        return np.empty(0, np.uint8)  # an empty file cannot be mapped
    try:
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise bad_file(path, f"cannot be mapped: {error.strerror or error}") from error


def numbers(
    content: npt.NDArray[np.uint8], offset: int, count: int, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return `count` numbers from byte `offset` on, as a view."""
    return np.frombuffer(content.data, dtype, count, offset) if count else np.empty(0, dtype)


class DocumentEdges(Protocol):
    """The tokens at which documents of a file begin; empty documents are left out."""

    def between(self, low: int, high: int) -> Ints:
        """Return the document starts in [low, high), ascending; 0 is one."""
        ...

    def next(self, position: int) -> int:
        """Return the first document start at or after `position`, or the number of tokens."""
        ...

    def chunks(self) -> Iterator[Ints]:
        """Yield all document starts, ascending, some at a time.

        Raises:
            CorpusError: If the index does not ascend or leads out of the file.
        """
        ...


def _starts(edges: Ints, *, from_zero: bool) -> Ints:
    """Return ascending edges without repeats, 0 among them if the range begins the file."""
    if from_zero:
        edges = np.concatenate([np.zeros(1, np.int64), edges])
    # Not np.unique, which hashes: 20 times as slow where numbers ascend already.
    is_new = np.ones(len(edges), np.bool_)
    is_new[1:] = edges[1:] != edges[:-1]
    return edges[is_new]


class IndexEdges:
    """Document edges from a column of cumulative starts or ends."""

    def __init__(
        self, column: npt.NDArray[Any], tokens: int, path: str, *, origin: int = 0, unit: int = 1
    ) -> None:
        """Read the numbers of `column`, of which `origin` is token 0 and `unit` one token."""
        self._column = column
        self._tokens = tokens
        self._path = path
        self._origin = origin
        self._unit = unit

    @classmethod
    def mapped(cls, info: EdgesInfo, tokens: int, corpus: str) -> IndexEdges:
        """Return the edges of a column in a file; a relative path starts at `corpus`."""
        column = numbers(map_file(info.file, corpus), info.offset, info.count, info.dtype)
        return cls(column, tokens, info.file.path, origin=info.origin, unit=info.unit)

    def between(self, low: int, high: int) -> Ints:
        """See `DocumentEdges`."""
        # Starts and ends give the same edges: an end is the start of the next document, and empty
        # documents repeat an edge.
        edges = self._scaled(slice(self._search(low), self._search(min(high, self._tokens))))
        return _starts(edges, from_zero=low == 0 < high)

    def next(self, position: int) -> int:
        """See `DocumentEdges`."""
        at = self._search(position)
        edge = int(self._scaled(slice(at, at + 1))[0]) if at < len(self._column) else self._tokens
        return 0 if position == 0 else min(edge, self._tokens)

    def chunks(self) -> Iterator[Ints]:
        """See `DocumentEdges`."""
        last = 0
        yield np.zeros(min(1, self._tokens), np.int64)
        for low in range(0, len(self._column), _CHUNK_EDGES):
            edges = self._scaled(slice(low, low + _CHUNK_EDGES))
            if edges[0] < last or np.any(edges[1:] < edges[:-1]):
                raise bad_file(self._path, "its document offsets do not ascend")
            if (end := int(edges[-1])) > self._tokens:
                problem = f"it ends at token {end:,}, beyond the {self._tokens:,} of its file"
                raise bad_file(self._path, problem)
            starts = _starts(edges, from_zero=False)
            yield starts[(starts > last) & (starts < self._tokens)]
            last = end

    def _search(self, position: int) -> int:
        number = position * self._unit + self._origin
        # Not np.searchsorted: Megatron's offsets are not aligned, and it would copy all of them.
        return bisect.bisect_left(self._column, number)

    def _scaled(self, part: slice) -> Ints:
        column = self._column[part].astype(np.int64)
        return (column - self._origin) // self._unit


@dataclass(frozen=True, slots=True)
class EosEdges:
    """Document edges found by searching the tokens for the end-of-text id."""

    tokens: TokenArray
    eos_id: int
    at_start: bool

    def between(self, low: int, high: int) -> Ints:
        """See `DocumentEdges`."""
        shift = 0 if self.at_start else 1
        first = max(low - shift, 0)
        at = np.flatnonzero(self.tokens[first : high - shift] == self.eos_id)
        edges = at + (first + shift)
        return _starts(edges, from_zero=low == 0 < high)

    def next(self, position: int) -> int:
        """See `DocumentEdges`."""
        for low in range(position, len(self.tokens), _CHUNK_TOKENS):
            edges = self.between(low, min(low + _CHUNK_TOKENS, len(self.tokens)))
            if len(edges):
                return int(edges[0])
        return len(self.tokens)

    def chunks(self) -> Iterator[Ints]:
        """See `DocumentEdges`."""
        for low in range(0, len(self.tokens), _CHUNK_TOKENS):
            yield self.between(low, min(low + _CHUNK_TOKENS, len(self.tokens)))


@dataclass(frozen=True, slots=True)
class OneDocument:
    """Edges of a file without index and end-of-text: all of it is one document."""

    tokens: int

    def between(self, low: int, high: int) -> Ints:
        """See `DocumentEdges`."""
        return np.zeros(1 if low == 0 < high else 0, np.int64)

    def next(self, position: int) -> int:
        """See `DocumentEdges`."""
        return self.tokens if position else 0

    def chunks(self) -> Iterator[Ints]:
        """See `DocumentEdges`."""
        yield self.between(0, self.tokens)


class TokenFile:
    """A token file, mapped."""

    def __init__(self, info: TokenFileInfo, options: TokenFileOptions, corpus: str = "") -> None:
        """Map the file that `info` describes; paths of its own index start at `corpus`.

        Raises:
            CorpusError: If a file is missing, or has changed since `info` was made.
        """
        self.info = info
        self._options = options
        content = map_file(info.file, corpus)
        # Unsigned: a negative id becomes one beyond any vocabulary.
        unsigned = f"<u{info.itemsize}"
        self.tokens: TokenArray = numbers(content, info.offset, info.tokens, unsigned)
        self.edges: DocumentEdges
        if info.edges is not None:
            self.edges = IndexEdges.mapped(info.edges, info.tokens, corpus)
        elif info.text_index is not None:
            column = document_ends(info.text_index)
            self.edges = IndexEdges(column, info.tokens, info.text_index.path)
        elif info.eos_at == "none":
            self.edges = OneDocument(info.tokens)
        else:
            self.edges = EosEdges(self.tokens, options.eos_id, at_start=info.eos_at == "start")
        self._loss = None if info.loss is None else map_file(info.loss, corpus)

    def read(self, low: int, high: int, dtype: npt.DTypeLike) -> TokenArray:
        """Return the tokens [low, high) as `dtype`; a view of the file where that is its type.

        Raises:
            CorpusError: If an id is outside the vocabulary.
        """
        tokens = self.tokens[low:high]
        # Reading the maximum costs less than a tenth of what a training step does with the tokens,
        # and an id outside would index past the embedding on a GPU.
        if len(tokens) and int(tokens.max()) >= self._options.vocab_size:
            raise self._outside(tokens, low)
        return tokens.astype(dtype, copy=False)

    def documents(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield first token and end of each document that begins in [low, high)."""
        starts = self.edges.between(low, min(high, self.info.tokens))
        if not len(starts):
            return
        ends = np.append(starts[1:], self.edges.next(min(high, self.info.tokens)))
        yield from zip(starts.tolist(), ends.tolist(), strict=True)

    def in_loss(self, low: int, high: int) -> npt.NDArray[np.bool_] | None:
        """Return which of the tokens [low, high) are in the loss; None where the file is silent."""
        return None if self._loss is None else self._loss[low:high] != 0

    def _outside(self, tokens: TokenArray, low: int) -> CorpusError:
        at = int(np.argmax(tokens >= self._options.vocab_size))
        # As it was written: negative where the type is signed.
        worst = int(tokens[at : at + 1].view(self.info.dtype)[0])
        return bad_file(
            self.info.file.path,
            f"token {low + at:,} is {worst:,}, outside the vocabulary of "
            f"{self._options.vocab_size:,} ids",
            fix="set corpus.tokenizer to the one that made the file, or the domain's token_dtype",
        )
