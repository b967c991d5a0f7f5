"""Plain text: files, lines or paragraphs as documents."""

from __future__ import annotations

from collections.abc import Iterator

from raymix.corpus.read.lines import Line, Source, lines_between
from raymix.corpus.read.opening import UTF8_BOM, opened, read_up_to
from raymix.corpus.read.parts import FileSlice
from raymix.corpus.read.records import TOO_LONG, Records, Value, decoded
from raymix.recipe import DomainConfig

Lines = Iterator[tuple[int, Line]]


def text_records(file_slice: FileSlice, domain: DomainConfig, limit: int) -> Records:
    """Yield the documents of a slice of plain text, of at most `limit` bytes each."""
    with opened(file_slice) as source:
        if domain.text_unit == "file":
            yield 1, _whole_file(source, limit)
            return
        numbered = numbered_lines(source, file_slice, limit)
        yield from _lines(numbered) if domain.text_unit == "line" else _paragraphs(numbered, limit)


def numbered_lines(source: Source, file_slice: FileSlice, limit: int) -> Lines:
    """Yield the lines of a slice from 1, the file's byte order mark left out."""
    lines = lines_between(source.read, file_slice.low, file_slice.high, limit=limit)
    for number, (line, complete) in enumerate(lines, 1):
        if number == 1 and not file_slice.low:
            line = line.removeprefix(UTF8_BOM)
        yield number, (line, complete)


def _whole_file(source: Source, limit: int) -> Value:
    # One byte more than the longest document allowed tells that it is too long.
    content = read_up_to(source, limit).removeprefix(UTF8_BOM)
    return decoded(content) if len(content) < limit else TOO_LONG


def _lines(numbered: Lines) -> Records:
    for number, (line, complete) in numbered:
        if complete:
            yield number, decoded(line) if line.strip() else None
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
    return decoded(b"\n".join(lines)) if size <= limit else TOO_LONG
