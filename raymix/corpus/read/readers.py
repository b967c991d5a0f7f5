"""Readers: the records of a slice, one by one, whatever the file format.

A record that cannot be used comes out as a `Reject` and the reading goes on; a file that cannot
be read any further is a `CorpusError` that names it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raymix.corpus.chats.messages import BadConversation, Conversation, conversation
from raymix.corpus.read.chat_columns import chat_columns, chat_rows
from raymix.corpus.read.csv_records import csv_records
from raymix.corpus.read.file_formats import is_json_values
from raymix.corpus.read.json_values import json_values
from raymix.corpus.read.lines import lines_between
from raymix.corpus.read.opening import PeekableSource, TrailingData, opened
from raymix.corpus.read.parts import (
    FileSlice,
    Part,
    check_column,
    is_arrow_file,
    nested_column,
    no_column,
    unreadable,
)
from raymix.corpus.read.records import (
    INVALID_UTF8,
    NULL,
    Records,
    Reject,
    Value,
    decoded,
    excerpt,
)
from raymix.corpus.read.text_records import numbered_lines, text_records
from raymix.corpus.read.token_records import LabeledTokens, TokenIds, labels_mask, token_records
from raymix.errors import CorpusError
from raymix.recipe import DomainConfig
from raymix.recipe.corpus import TOKEN_FORMATS
from raymix.store import TokenizerInfo
from raymix.store.remote import files
from raymix.store.remote.errors import translate_storage_errors

BATCH_BYTES = 1 << 20
"""Bytes of text decoded at a time from columnar files."""

# Bounds the Python objects that are alive at a time where texts are very short.
_MAX_BATCH_ROWS = 4096
# A character is at most six bytes of JSON (an escape) and a token id at most eight.
_MAX_ESCAPE_BYTES = 6
_LINE_SLACK = 1 << 20
_MAX_FIRST_CHARACTERS = 1 << 24


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
    number = 0
    try:
        with translate_storage_errors(file_slice.file.url, "file"):
            for number, value in _records(file_slice, domain, max_characters, tokenizer):
                yield number, value
    except TrailingData as error:
        yield number + 1, Reject("data after the end of the compressed data", excerpt(*error.args))
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
    elif file_slice.file.format == "csv":
        yield from csv_records(file_slice, domain, max_characters * 4 + _LINE_SLACK)
    else:
        yield from text_records(file_slice, domain, max_characters * 4 + 4)


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
        beside = _columns_beside(domain, reader.schema_arrow.names)
        wanted = [column, *filter(None, beside)]
        # Arrow's own threads would compete with one reader per core.
        # A path such as `doc.text` reads that one field of the struct.
        batches = reader.iter_batches(batch, row_groups=groups, columns=wanted, use_threads=False)
        columns = (_values(*_wanted(records, domain), domain) for records in batches)
        yield from enumerate(itertools.chain.from_iterable(columns), 1)


def _arrow(file_slice: FileSlice, domain: DomainConfig) -> Records:
    with files.open_mapped(file_slice.file.url) as source:
        yield from enumerate(_arrow_values(source, file_slice, domain), 1)


def _arrow_values(
    source: pa.NativeFile, file_slice: FileSlice, domain: DomainConfig
) -> Iterator[Value]:
    column = domain.column
    for records in _arrow_batches(source, file_slice):
        check_column(domain, file_slice.file, records.schema, column)
        for low in range(0, records.num_rows, _MAX_BATCH_ROWS):
            rows = records.slice(low, _MAX_BATCH_ROWS)
            values, beside = _wanted(rows, domain)
            # Only Arrow files: Parquet's decoder writes its own offsets.
            _check_layout(values)
            for other in beside:
                if other is not None:
                    _check_layout(other)
            yield from _values(values, beside, domain)


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


_Beside = tuple[pa.Array | None, pa.Array | None]


def _columns_beside(domain: DomainConfig, names: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the columns read beside the main one: labels, or tools and system turns."""
    return (domain.labels_column, None) if domain.labels_column else chat_columns(domain, names)


def _wanted(records: pa.RecordBatch, domain: DomainConfig) -> tuple[pa.Array, _Beside]:
    """Return the column that a domain reads, and those beside it."""
    first, second = (
        records.column(name) if name else None
        for name in _columns_beside(domain, records.schema.names)
    )
    return nested_column(records, domain.column), (first, second)


def _values(values: pa.Array, beside: _Beside, domain: DomainConfig) -> Iterator[Value]:
    if domain.messages_column:
        for row in chat_rows(values, *beside):
            yield _messages(*row, typed=True)
        return
    if beside[0] is None:
        yield from _column(values, domain)
        return
    for ids, row_labels in zip(_column(values, domain), beside[0].to_pylist(), strict=True):
        yield ids if not isinstance(ids, np.ndarray) else labeled(ids, row_labels)


def _column(values: pa.Array, domain: DomainConfig) -> Iterator[Value]:
    if pa.types.is_null(values.type):
        # The type of a column in which a writer saw nothing but nulls.
        yield from itertools.repeat(NULL, len(values))
        return
    if domain.tokens_column:
        for scalar in values:
            yield scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else NULL
        return
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        yield from [NULL if text is None else decoded(text) for text in values.to_pylist()]
    except UnicodeDecodeError:
        # One bad row fails the whole batch; taken as bytes, each row is judged on its own.
        raw = values.cast(pa.large_binary()).to_pylist()
        yield from (NULL if text is None else decoded(text) for text in raw)


def _jsonl(file_slice: FileSlice, domain: DomainConfig, limit: int) -> Records:
    with opened(file_slice) as source:
        # Files that are cut into ranges of bytes were seen to be lines when they were cut.
        if file_slice.high is None and is_json_values(source.peek()):
            for number, (value, text) in enumerate(json_values(source, limit), 1):
                yield number, _record(value, text, domain)
            return
        for number, (line, complete) in numbered_lines(source, file_slice, limit):
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
        return Reject(INVALID_UTF8, excerpt(line))
    # Deeply nested brackets exhaust the recursion limit, not the parser.
    except (ValueError, RecursionError):
        return Reject("invalid JSON", excerpt(line))
    return _record(record, line, domain)


def _record(record: object, line: bytes | str, domain: DomainConfig) -> Value:
    """Return the document in a value of JSON, whose text is `line`."""
    if isinstance(record, Reject):
        return record
    if not isinstance(record, dict):
        return Reject("not a JSON object", excerpt(line))
    column = domain.column
    try:
        value = nested_value(record, column)
    except KeyError:
        return Reject(f"no {column!r} key", excerpt(line))
    if value is None:
        return NULL
    if domain.messages_column:
        columns = chat_columns(domain, record)
        absent = [name for name in columns if name and name not in record]
        if absent:
            return Reject(f"no {absent[0]!r} key", excerpt(line))
        tools, system = (record[name] if name else None for name in columns)
        return _messages(value, tools, system)
    if domain.tokens_column:
        ids = _token_ids(value, line)
        if domain.labels_column is None or isinstance(ids, Reject):
            return ids
        return labeled(ids, record.get(domain.labels_column))
    return value if isinstance(value, str) else Reject("not text", excerpt(line))


def nested_value(record: Mapping[str, object], column: str) -> object:
    """Return the value under a key, or under a path of keys such as `doc.text`.

    A null on the way is the value. A key that has dots itself comes first.

    Raises:
        KeyError: If there is no such key.
    """
    if column in record:
        return record[column]
    value: object = record
    for key in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise KeyError(column)
        value = value[key]
    return value


def _messages(
    value: object, tools: object, system: object, *, typed: bool = False
) -> Conversation | Reject:
    if value is None:
        return NULL
    try:
        return conversation(value, tools, system, typed=typed)
    except BadConversation as error:
        return Reject(str(error), excerpt(value))


def labeled(ids: TokenIds, labels: object) -> LabeledTokens | Reject:
    """Return ids with the labels of a record, or why they do not go together."""
    try:
        return LabeledTokens(ids, labels_mask(ids, labels))
    except ValueError as error:
        return Reject(str(error), excerpt(labels))


def _token_ids(value: object, line: bytes | str) -> TokenIds | Reject:
    # `type(...) is int`: True is an int to isinstance.
    if isinstance(value, list) and all(type(item) is int for item in value):
        with contextlib.suppress(OverflowError):
            return np.array(value, dtype=np.int64)
    return Reject("not a list of token ids", excerpt(line))


def check_first_records(
    domains: Iterable[DomainConfig], parts: Mapping[str, Sequence[Part]]
) -> None:
    """Check that the first file of each domain is text, and that its first record has the column.

    Raises:
        CorpusError: If not; with a message per domain.
    """
    problems: list[str] = []
    for domain in domains:
        first = next((cut for part in parts.get(domain.name, ()) for cut in part.slices), None)
        if first is not None and first.file.format in ("jsonl", "csv", "text"):
            try:
                check_first_record(first, domain)
            except CorpusError as error:
                problems += error.problems
    if problems:
        raise CorpusError(*problems)


def check_first_record(file_slice: FileSlice, domain: DomainConfig) -> None:
    """Check that a file is text, and that the first object of JSON has the column.

    Raises:
        CorpusError: If it has not; the message lists the keys found. Bad JSON is not judged here.
    """
    if file_slice.file.format != "jsonl":
        # An encoding shows in the first bytes, a column in the header.
        next(read_slice(file_slice, domain, max_characters=_MAX_FIRST_CHARACTERS), None)
        return
    record: object = None
    with contextlib.suppress(OSError), opened(file_slice) as source:
        record = _first_record(source)
    if isinstance(record, dict):
        try:
            nested_value(record, domain.column)
        except KeyError:
            field = f"{domain.name}.{domain.column_field}"
            raise no_column(field, domain.column, file_slice.file, record) from None


def _first_record(source: PeekableSource) -> object:
    """Return the first record of a file of JSON; None where it is bad, or there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError, StopIteration):
        if is_json_values(source.peek()):
            return next(json_values(source, _MAX_FIRST_CHARACTERS))[0]
        line, _ = next(lines_between(source.read, 0, None, limit=_MAX_FIRST_CHARACTERS))
        return json.loads(line.decode("utf-8-sig"))
    return None
