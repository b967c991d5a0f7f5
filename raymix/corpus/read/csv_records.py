"""CSV: one document per row, in the column that the domain reads."""

from __future__ import annotations

import csv
import io

from typing_extensions import Buffer, override

from raymix.corpus.read.lines import Source
from raymix.corpus.read.opening import opened
from raymix.corpus.read.parts import FileSlice, no_column
from raymix.corpus.read.records import INVALID_UTF8, Records, Reject, Value, excerpt
from raymix.errors import CorpusError
from raymix.recipe import DomainConfig

# In the order of preference, should two of them give the column.
_DELIMITERS = (",", "\t", ";", "|")


def csv_records(file_slice: FileSlice, domain: DomainConfig, limit: int) -> Records:
    """Yield the rows of a file with a header, by RFC 4180; the header tells the delimiter.

    Args:
        file_slice: A whole file.
        domain: Says which column holds the text.
        limit: Most bytes of a field.

    Raises:
        CorpusError: If the header lacks the column, or quotes are not closed.
    """
    # A limit of the whole process, 128 KiB at first.
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    with opened(file_slice) as source:
        raw = io.BufferedReader(_Raw(source))
        lines = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        header = next(lines, "")
        if not header:
            return
        delimiter, names = _read_header(header, file_slice, domain)
        place = names.index(domain.column)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                # A blank line is a row without fields.
                yield number, _value(row, place, len(names)) if row else None
        except csv.Error as error:
            problem = f"row {rows.line_num + 1} is no CSV: {error}"
            fix = 'quote fields by ", and a quote inside as "" (RFC 4180)'
            raise CorpusError.at("file", file_slice.file.url, problem, fix=fix) from error


def _read_header(header: str, file_slice: FileSlice, domain: DomainConfig) -> tuple[str, list[str]]:
    split = {mark: next(csv.reader([header], delimiter=mark)) for mark in _DELIMITERS}
    for delimiter, names in split.items():
        if domain.column in names:
            return delimiter, names
    # The delimiter that finds the most columns is the file's.
    names = max(split.values(), key=len)
    raise no_column(f"{domain.name}.{domain.column_field}", domain.column, file_slice.file, names)


def _value(row: list[str], place: int, columns: int) -> Value:
    if len(row) != columns:
        return Reject(f"a row of {len(row)} fields, the header has {columns}", excerpt(row[0]))
    try:
        row[place].encode()
    except UnicodeEncodeError:
        return Reject(INVALID_UTF8, excerpt(row[place]))
    return row[place]


class _Raw(io.RawIOBase):
    """A source as a file of Python's."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rest = b""

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        content = self._rest or self._source.read(len(view))
        count = min(len(view), len(content))
        view[:count] = content[:count]
        self._rest = content[count:]
        return count
