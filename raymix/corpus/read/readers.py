"""Readers: the records of a slice, one by one, whatever the file format.

A record that cannot be used comes out as a `Reject` and the reading goes on; a file that cannot
be read any further is a `CorpusError` that names it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raymix.corpus.read.chat import Conversation, conversation
from raymix.corpus.read.lines import lines_between
from raymix.corpus.read.parts import (
    FileSlice,
    Part,
    check_column,
    is_arrow_file,
    no_column,
    unreadable,
)
from raymix.corpus.read.token_records import LabeledTokens, TokenIds, labels_mask, token_records
from raymix.errors import CorpusError
from raymix.recipe import DomainConfig
from raymix.recipe.corpus import TOKEN_FORMATS
from raymix.store import TokenizerInfo
from raymix.store.remote import files
from raymix.store.remote.errors import translate_storage_errors

BATCH_BYTES = 1 << 20
"""Bytes of text decoded at a time from columnar files."""

_EXCERPT_CHARACTERS = 200
# Bounds the Python objects that are alive at a time where texts are very short.
_MAX_BATCH_ROWS = 4096
# A character is at most six bytes of JSON (an escape) and a token id at most eight.
_MAX_ESCAPE_BYTES = 6
_LINE_SLACK = 1 << 20


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used: why, and how it begins."""

    reason: str
    excerpt: str


TOO_LONG = Reject("too long", "")
"""Stands for a document that was not read to its end, being longer than any that is wanted."""

Value = str | TokenIds | LabeledTokens | Conversation | Reject
Records = Iterator[tuple[int, Value | None]]


def read_slice(
    file_slice: FileSlice,
    domain: DomainConfig,
    *,
    max_characters: int,
    tokenizer: TokenizerInfo | None = None,
) -> Records:
    """Yield the records of a slice: the line or row number in the slice (from 1) and the value.

    The value is None for a blank line, which is no record but has a number.

    Args:
        file_slice: The range of a file to read.
        domain: Says which column holds what, and what a document of a text file is.
        max_characters: Longest document wanted; a line far beyond it is not read whole.
        tokenizer: The tokenizer that made the ids; needed for token files.

    Raises:
        CorpusError: If the file is damaged, or has changed since it was planned.
    """
    try:
        with translate_storage_errors(file_slice.file.url, "file"):
            yield from _records(file_slice, domain, max_characters, tokenizer)
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException) as error:
        raise unreadable(file_slice.file, error) from error


def _records(
    file_slice: FileSlice,
    domain: DomainConfig,
    max_characters: int,
    tokenizer: TokenizerInfo | None,
) -> Records:
    if file_slice.file.format == "parquet":
        yield from _parquet(file_slice, domain)
    elif file_slice.file.format == "arrow":
        yield from _arrow(file_slice, domain)
    elif tokenizer is not None and file_slice.file.format in TOKEN_FORMATS:
        yield from token_records(file_slice, domain, tokenizer)
    elif file_slice.file.format == "jsonl":
        yield from _jsonl(file_slice, domain, max_characters * _MAX_ESCAPE_BYTES + _LINE_SLACK)
    else:
        yield from _text(file_slice, domain, max_characters * 4 + 4)


@contextlib.contextmanager
def _opened(file_slice: FileSlice) -> Iterator[pa.NativeFile]:
    filesystem, path = files.locate(file_slice.file.url)
    if file_slice.file.compression:
        raw = filesystem.open_input_stream(path, compression=None)
        with raw, pa.CompressedInputStream(raw, file_slice.file.compression) as source:
            yield source
    else:
        with filesystem.open_input_file(path) as source:
            yield source


def _parquet(file_slice: FileSlice, domain: DomainConfig) -> Records:
    column = domain.column
    filesystem, path = files.locate(file_slice.file.url)
    remote = not isinstance(filesystem, pafs.LocalFileSystem)
    with filesystem.open_input_file(path) as source:
        # Coalesced reads hide the latency of an object store; on a local disk they only take
        # memory.
        reader = pq.ParquetFile(source, pre_buffer=remote)
        check_column(domain, file_slice.file, reader.schema_arrow, column)
        end = reader.num_row_groups if file_slice.high is None else file_slice.high
        groups = range(file_slice.low, end)
        # Rows per batch by the mean size: long documents give small batches, so memory stays
        # bounded.
        rows = sum(reader.metadata.row_group(group).num_rows for group in groups)
        batch = min(max(rows * BATCH_BYTES // max(file_slice.size, 1), 1), _MAX_BATCH_ROWS)
        labels = [domain.labels_column] if domain.labels_column else []
        # Arrow's own threads would compete with one reader per core.
        batches = reader.iter_batches(
            batch, row_groups=groups, columns=[column, *labels], use_threads=False
        )
        columns = (_values(records, domain) for records in batches)
        yield from enumerate(chain.from_iterable(columns), 1)


def _arrow(file_slice: FileSlice, domain: DomainConfig) -> Records:
    with files.open_mapped(file_slice.file.url) as source:
        yield from enumerate(_arrow_values(source, file_slice, domain), 1)


def _arrow_values(
    source: pa.NativeFile, file_slice: FileSlice, domain: DomainConfig
) -> Iterator[Value]:
    column = domain.column
    for records in _arrow_batches(source, file_slice):
        check_column(domain, file_slice.file, records.schema, column)
        wanted = records.select([column, *([domain.labels_column] if domain.labels_column else [])])
        for low in range(0, records.num_rows, _MAX_BATCH_ROWS):
            rows = wanted.slice(low, _MAX_BATCH_ROWS)
            # Only Arrow files: Parquet's decoder writes its own offsets.
            for values in rows.columns:
                _check_layout(values)
            yield from _values(rows, domain)


def _check_layout(values: pa.Array) -> None:
    """Check the offsets, which a damaged file could send anywhere; UTF-8 is judged row by row."""
    if pa.types.is_string(values.type):
        values = values.cast(pa.binary())
    elif pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())
    values.validate(full=True)


def _arrow_batches(source: pa.NativeFile, file_slice: FileSlice) -> Iterator[pa.RecordBatch]:
    if not is_arrow_file(source):
        yield from pa.ipc.open_stream(source)
        return
    reader = pa.ipc.open_file(source)
    end = reader.num_record_batches if file_slice.high is None else file_slice.high
    for number in range(file_slice.low, end):
        yield reader.get_batch(number)


def _values(records: pa.RecordBatch, domain: DomainConfig) -> Iterator[Value]:
    values = _column(records.column(domain.column), domain)
    if domain.labels_column is None:
        yield from values
        return
    labels = records.column(domain.labels_column).to_pylist()
    for ids, row_labels in zip(values, labels, strict=True):
        yield ids if not isinstance(ids, np.ndarray) else labeled(ids, row_labels)


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
        # One bad row fails the whole batch; taken as bytes, each row is judged on its own.
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
        value = value[: 4 * _EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    text = value if isinstance(value, str) else repr(value)
    return text[:_EXCERPT_CHARACTERS].encode(errors="backslashreplace").decode()


def _jsonl(file_slice: FileSlice, domain: DomainConfig, limit: int) -> Records:
    with _opened(file_slice) as source:
        if file_slice.low:
            source.seek(file_slice.low - 1)
        lines = lines_between(source.read, file_slice.low, file_slice.high, limit=limit)
        for number, (line, complete) in enumerate(lines, 1):
            if number == 1 and not file_slice.low:
                # The byte order mark that some Windows tools write is not part of the JSON.
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not complete:
                yield number, Reject("line too long", excerpt(line))
            else:
                yield number, json_value(line, domain) if line.strip() else None


def json_value(line: bytes, domain: DomainConfig) -> Value:
    """Return the document in one line of JSON, or why there is none."""
    try:
        # Decoded here, not by json: it would accept UTF-16 and UTF-32 by guessing.
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Reject("invalid UTF-8", excerpt(line))
    # Deeply nested brackets exhaust the recursion limit, not the parser.
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
        ids = _token_ids(value, line)
        if domain.labels_column is None or isinstance(ids, Reject):
            return ids
        return labeled(ids, record.get(domain.labels_column))
    return value if isinstance(value, str) else Reject("not text", excerpt(line))


def _messages(value: object) -> Conversation | Reject:
    if value is None:
        return _null()
    return conversation(value) or Reject("not a list of messages", excerpt(value))


def labeled(ids: TokenIds, labels: object) -> LabeledTokens | Reject:
    """Return ids with the labels of a record, or why they do not go together."""
    try:
        return LabeledTokens(ids, labels_mask(ids, labels))
    except ValueError as error:
        return Reject(str(error), excerpt(labels))


def _token_ids(value: object, line: bytes) -> TokenIds | Reject:
    # `type(...) is int`: True is an int to isinstance.
    if isinstance(value, list) and all(type(item) is int for item in value):
        with contextlib.suppress(OverflowError):
            return np.array(value, dtype=np.int64)
    return Reject("not a list of token ids", excerpt(line))


def _text(file_slice: FileSlice, domain: DomainConfig, limit: int) -> Records:
    with _opened(file_slice) as source:
        if domain.text_unit == "file":
            yield 1, _whole_file(source, limit)
            return
        if file_slice.low:
            source.seek(file_slice.low - 1)
        lines = lines_between(source.read, file_slice.low, file_slice.high, limit=limit)
        numbered = enumerate(lines, 1)
        yield from _lines(numbered) if domain.text_unit == "line" else _paragraphs(numbered, limit)


def _whole_file(source: pa.NativeFile, limit: int) -> Value:
    # One byte more than the longest document allowed tells that it is too long.
    content = source.read(limit)
    return _decoded(content) if len(content) < limit else TOO_LONG


Lines = Iterator[tuple[int, tuple[bytes, bool]]]


def _lines(numbered: Lines) -> Records:
    for number, (line, complete) in numbered:
        if complete:
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


def check_first_lines(domains: Iterable[DomainConfig], parts: Mapping[str, Sequence[Part]]) -> None:
    """Check that the first JSON object of each domain has the column that the domain reads.

    Raises:
        CorpusError: If not; with a message per domain.
    """
    problems: list[str] = []
    for domain in domains:
        first = next((cut for part in parts.get(domain.name, ()) for cut in part.slices), None)
        if first is not None and first.file.format == "jsonl":
            try:
                check_first_line(first, domain)
            except CorpusError as error:
                problems += error.problems
    if problems:
        raise CorpusError(*problems)


def check_first_line(file_slice: FileSlice, domain: DomainConfig) -> None:
    """Check that the first JSON object of a file has the column the domain reads.

    Raises:
        CorpusError: If it has not; the message lists the keys found. Bad JSON is not judged here.
    """
    record: object = None
    with contextlib.suppress(OSError, ValueError, RecursionError), _opened(file_slice) as source:
        line, _ = next(lines_between(source.read, 0, None, limit=1 << 24), (b"null", True))
        record = json.loads(line.decode("utf-8-sig"))
    column = domain.column
    if isinstance(record, dict) and column not in record:
        raise no_column(f"{domain.name}.{domain.column_field}", column, file_slice.file, record)
