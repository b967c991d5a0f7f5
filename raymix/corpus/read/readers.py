"""Readers: the records of a slice, one by one, whatever the file format.

A record that cannot be used comes out as a `Reject` and the reading goes on; a file that cannot
be read any further is a `CorpusError` that names it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raymix.corpus.read.chat import Conversation, conversation
from raymix.corpus.read.lines import lines_between
from raymix.corpus.read.parts import FileSlice, check_column, is_arrow_file, no_column, unreadable
from raymix.recipe import DomainConfig
from raymix.store.remote import files

BATCH_BYTES = 1 << 20
"""Bytes of text decoded at a time from columnar files."""

_EXCERPT = 200
_MOST_ROWS = 4096
# A character is at most six bytes of JSON (an escape) and a token id at most eight.
_ESCAPED = 6
_LINE_SLACK = 1 << 20

TokenIds = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used: why, and how it begins."""

    reason: str
    excerpt: str


TOO_LONG = Reject("too long", "")
"""Stands for a document that was not read to its end, being longer than any that is wanted."""

Value = str | TokenIds | Conversation | Reject
Records = Iterator[tuple[int, Value | None]]


def read_slice(piece: FileSlice, domain: DomainConfig, *, max_characters: int) -> Records:
    """Yield the records of a slice: the line or row number in the slice (from 1) and the value.

    The value is None for a blank line, which is no record but has a number.

    Args:
        piece: What to read.
        domain: Says which column holds what, and what a document of a text file is.
        max_characters: Longest document wanted; a line far beyond it is not read whole.

    Raises:
        CorpusError: If the file is damaged, or has changed since it was planned.
    """
    try:
        if piece.file.format == "parquet":
            yield from _parquet(piece, domain)
        elif piece.file.format == "arrow":
            yield from _arrow(piece, domain)
        elif piece.file.format == "jsonl":
            yield from _jsonl(piece, domain, max_characters * _ESCAPED + _LINE_SLACK)
        else:
            yield from _text(piece, domain, max_characters * 4 + 4)
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException) as error:
        raise unreadable(piece.file, error) from error


@contextlib.contextmanager
def _opened(piece: FileSlice) -> Iterator[pa.NativeFile]:
    filesystem, path = files.locate(piece.file.url)
    if piece.file.compression:
        raw = filesystem.open_input_stream(path, compression=None)
        with raw, pa.CompressedInputStream(raw, piece.file.compression) as source:
            yield source
    else:
        with filesystem.open_input_file(path) as source:
            yield source


def _parquet(piece: FileSlice, domain: DomainConfig) -> Records:
    column = domain.column
    filesystem, path = files.locate(piece.file.url)
    remote = not isinstance(filesystem, pafs.LocalFileSystem)
    with filesystem.open_input_file(path) as source:
        reader = pq.ParquetFile(source, pre_buffer=remote)
        check_column(domain, piece.file, reader.schema_arrow, column)
        end = reader.num_row_groups if piece.high is None else piece.high
        groups = range(piece.low, end)
        rows = sum(reader.metadata.row_group(group).num_rows for group in groups)
        batch = min(max(rows * BATCH_BYTES // max(piece.size, 1), 1), _MOST_ROWS)
        batches = reader.iter_batches(batch, row_groups=groups, columns=[column], use_threads=False)
        columns = (_column(records.column(0), domain) for records in batches)
        yield from enumerate(chain.from_iterable(columns), 1)


def _arrow(piece: FileSlice, domain: DomainConfig) -> Records:
    with files.open_mapped(piece.file.url) as source:
        yield from enumerate(_arrow_values(source, piece, domain), 1)


def _arrow_values(source: pa.NativeFile, piece: FileSlice, domain: DomainConfig) -> Iterator[Value]:
    column = domain.column
    for records in _arrow_batches(source, piece):
        check_column(domain, piece.file, records.schema, column)
        index = records.schema.get_field_index(column)
        for low in range(0, records.num_rows, _MOST_ROWS):
            values = records.column(index).slice(low, _MOST_ROWS)
            _check_layout(values)
            yield from _column(values, domain)


def _check_layout(values: pa.Array) -> None:
    """Check the offsets, which a damaged file could send anywhere; UTF-8 is judged row by row."""
    if pa.types.is_string(values.type):
        values = values.cast(pa.binary())
    elif pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())
    values.validate(full=True)


def _arrow_batches(source: pa.NativeFile, piece: FileSlice) -> Iterator[pa.RecordBatch]:
    if not is_arrow_file(source):
        yield from pa.ipc.open_stream(source)
        return
    reader = pa.ipc.open_file(source)
    end = reader.num_record_batches if piece.high is None else piece.high
    for number in range(piece.low, end):
        yield reader.get_batch(number)


def _column(values: pa.Array, domain: DomainConfig) -> Iterator[Value]:
    if domain.messages_column:
        yield from (_messages(value) for value in values.to_pylist())
        return
    if domain.tokens_column:
        for scalar in values:
            yield scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else _null()
        return
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        yield from [_null() if text is None else _decoded(text) for text in values.to_pylist()]
    except UnicodeDecodeError:
        raw = values.cast(pa.large_binary()).to_pylist()
        yield from (_null() if text is None else _decoded(text) for text in raw)


def _decoded(text: str | bytes) -> str | Reject:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError:
        return Reject("invalid UTF-8", excerpt(text))


def _null() -> Reject:
    return Reject("null", "")


def excerpt(value: object) -> str:
    """Return how a bad record begins, in printable form."""
    if isinstance(value, bytes):
        value = value[: 4 * _EXCERPT].decode(errors="backslashreplace")
    text = value if isinstance(value, str) else repr(value)
    return text[:_EXCERPT].encode(errors="backslashreplace").decode()


def _jsonl(piece: FileSlice, domain: DomainConfig, limit: int) -> Records:
    with _opened(piece) as source:
        if piece.low:
            source.seek(piece.low - 1)
        lines = lines_between(source.read, piece.low, piece.high, limit=limit)
        for number, (line, whole) in enumerate(lines, 1):
            if number == 1 and not piece.low:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not whole:
                yield number, Reject("line too long", excerpt(line))
            else:
                yield number, json_value(line, domain) if line.strip() else None


def json_value(line: bytes, domain: DomainConfig) -> Value:
    """Return the document in one line of JSON, or why there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Reject("invalid UTF-8", excerpt(line))
    except (ValueError, RecursionError):
        return Reject("invalid JSON", excerpt(line))
    if not isinstance(record, dict):
        return Reject("not a JSON object", excerpt(line))
    column = domain.column
    if column not in record:
        return Reject(f"no {column!r} key", excerpt(line))
    value = record[column]
    if value is None:
        return Reject("null", excerpt(line))
    if domain.messages_column:
        return _messages(value)
    if domain.tokens_column:
        return _token_ids(value, line)
    return value if isinstance(value, str) else Reject("not text", excerpt(line))


def _messages(value: object) -> Conversation | Reject:
    if value is None:
        return _null()
    return conversation(value) or Reject("not a list of messages", excerpt(value))


def _token_ids(value: object, line: bytes) -> TokenIds | Reject:
    if isinstance(value, list) and all(type(item) is int for item in value):
        with contextlib.suppress(OverflowError):
            return np.array(value, dtype=np.int64)
    return Reject("not a list of token ids", excerpt(line))


def _text(piece: FileSlice, domain: DomainConfig, limit: int) -> Records:
    with _opened(piece) as source:
        if domain.text_unit == "file":
            yield 1, _whole_file(source, limit)
            return
        if piece.low:
            source.seek(piece.low - 1)
        lines = lines_between(source.read, piece.low, piece.high, limit=limit)
        numbered = enumerate(lines, 1)
        yield from _lines(numbered) if domain.text_unit == "line" else _paragraphs(numbered, limit)


def _whole_file(source: pa.NativeFile, limit: int) -> Value:
    content = source.read(limit)
    return _decoded(content) if len(content) < limit else TOO_LONG


Lines = Iterator[tuple[int, tuple[bytes, bool]]]


def _lines(numbered: Lines) -> Records:
    for number, (line, whole) in numbered:
        if whole:
            yield number, _decoded(line) if line.strip() else None
        else:
            yield number, TOO_LONG


def _paragraphs(numbered: Lines, limit: int) -> Records:
    """Yield runs of lines between blank ones, under the number of their first line."""
    first = size = 0
    lines: list[bytes] = []
    for number, (line, _) in numbered:
        if line.strip():
            first = first if lines else number
            size += len(line) + 1
            # What is over the limit is dropped for its length; it need not be kept whole.
            lines.append(line if size <= limit else b"")
        elif lines:
            yield first, _paragraph(lines, size, limit)
            lines, size = list[bytes](), 0
    if lines:
        yield first, _paragraph(lines, size, limit)


def _paragraph(lines: list[bytes], size: int, limit: int) -> Value:
    return _decoded(b"\n".join(lines)) if size <= limit else TOO_LONG


def check_first_line(piece: FileSlice, domain: DomainConfig) -> None:
    """Check that the first JSON object of a file has the column the domain reads.

    Raises:
        CorpusError: If it has not; the message lists the keys found. Bad JSON is not judged here.
    """
    record: object = None
    with contextlib.suppress(OSError, ValueError, RecursionError), _opened(piece) as source:
        line, _ = next(lines_between(source.read, 0, None, limit=1 << 24), (b"null", True))
        record = json.loads(line.decode("utf-8-sig"))
    column = domain.column
    if isinstance(record, dict) and column not in record:
        raise no_column(f"{domain.name}.{domain.column_field}", column, piece.file, record)
