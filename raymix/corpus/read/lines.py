"""Lines of a file of any length, read in chunks, so that no line can fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

# Large enough that the Python loop runs rarely, small beside the memory of a batch.
CHUNK = 1 << 20
"""Bytes read at a time."""


class Source(Protocol):
    """A file that is read forward."""

    def read(self, size: int, /) -> bytes:
        """Return some bytes, at most about `size`; none at the end."""
        ...


Read = Callable[[int], bytes]
Line = tuple[bytes, bool]
"""A line without its end, and whether it is whole."""


def lines_between(
    read: Read, low: int, high: int | None, *, limit: int
) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines that start in the bytes [low, high), without their line ends.

    Each comes with whether it is whole: a line of more than `limit` bytes is cut there.

    Args:
        read: Reads up to so many bytes; it stands at byte `low - 1` of the file, or at its
            start where `low` is 0, so that a line which starts exactly at `low` is seen.
        low: First byte of the range.
        high: End of the range, or None for the end of the file.
        limit: Most bytes of a line to keep.
    """
    position = max(low - 1, 0)  # of the line in `pending`
    skipping = low > 0  # the line under way belongs to the range before
    pending: list[bytes] = []
    kept_bytes = length = 0
    while high is None or position < high:
        chunk = read(CHUNK)
        if not chunk:
            break
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            kept_bytes = _keep(pending, chunk, begin, end, limit - kept_bytes) + kept_bytes
            length += end - begin
            if not skipping:
                yield _line(pending, length <= limit)
            position += length + 1
            pending, kept_bytes, length, skipping = list[bytes](), 0, 0, False
            begin = end + 1
            # The next line starts beyond the range and belongs to the next reader.
            if high is not None and position >= high:
                return
        # The chunk ends within a line: keep its beginning until the line end is found.
        kept_bytes += _keep(pending, chunk, begin, len(chunk), limit - kept_bytes)
        length += len(chunk) - begin
    # The last line of a file may have no line end.
    if length and not skipping and (high is None or position < high):
        yield _line(pending, length <= limit)


def _keep(pending: list[bytes], chunk: bytes, begin: int, end: int, limit: int) -> int:
    part = chunk[begin : min(end, begin + limit)]
    pending.append(part)
    return len(part)


def _line(pending: list[bytes], complete: bool) -> tuple[bytes, bool]:
    line = pending[0] if len(pending) == 1 else b"".join(pending)
    return line.removesuffix(b"\r"), complete
