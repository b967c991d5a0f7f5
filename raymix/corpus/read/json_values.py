"""Files of JSON that are not lines: one array of records, or records printed over many lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from raymix.corpus.read.lines import Source
from raymix.corpus.read.records import INVALID_UTF8, Reject, excerpt

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_SPACE_AND_COMMAS = re.compile(r"[ \t\n\r,]*")
# `surrogateescape` stands for a byte that is no UTF-8 by one of these.
_BAD_BYTE = re.compile(r"[\udc80-\udcff]")


def json_values(source: Source, limit: int) -> Iterator[tuple[object, str]]:
    """Yield the values of a file one by one, and the text of each; arrays give their elements.

    Memory: the longest value, and a megabyte.

    Args:
        source: UTF-8, with a byte order mark or not.
        limit: Most characters of a value.

    Raises:
        OSError: If it is no JSON, or a value is longer than `limit`.
    """
    decoder, scan = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder()
    text, position, ended, in_array, wanted = "", 0, False, False, _CHUNK
    while True:
        space = (_SPACE_AND_COMMAS if in_array else _SPACE).match(text, position)
        position = space.end() if space else position
        if position < len(text) and text[position] in ("]" if in_array else "["):
            in_array, position = not in_array, position + 1
            continue
        value = end = None
        if position < len(text):
            try:
                value, end = scan.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if ended:
                    raise OSError(f"invalid JSON: {error}") from None
        # A number that the chunk cuts in two is a number as well.
        if end is not None and (end < len(text) or ended):
            yield _checked(value, text[position:end])
            position, wanted = end, _CHUNK
        elif ended:
            if in_array:
                raise OSError("invalid JSON: the array is not closed; the file was cut off")
            return
        elif len(text) - position > limit:
            shown = excerpt(text[position:])
            raise OSError(f"invalid JSON, or a record of over {limit:,} characters: {shown!r}")
        else:
            text, position = text[position:], 0
            # Twice as much each time: every attempt begins at the value's beginning.
            while not ended and len(text) < wanted:
                chunk = source.read(_CHUNK)
                text, ended = text + decoder.decode(chunk, final=not chunk), not chunk
                text = text.removeprefix("\ufeff")
            wanted *= 2


def _checked(value: object, text: str) -> tuple[object, str]:
    if _BAD_BYTE.search(text):
        return Reject(INVALID_UTF8, excerpt(text)), text
    return value, text
