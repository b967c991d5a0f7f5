"""Records: the values that readers yield, good and bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raymix.corpus.chats.messages import Conversation
from raymix.corpus.read.token_records import LabeledTokens, TokenIds

_EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used: why, and how it begins."""

    reason: str
    excerpt: str


TOO_LONG = Reject("too long", "")
"""Stands for a document that was not read to its end, being longer than any that is wanted."""

NULL = Reject("null", "")
"""Stands for a record whose column is null; it is dropped as an empty document is."""

INVALID_UTF8 = "invalid UTF-8"
"""Reason of rejects in another encoding."""

Value = str | TokenIds | LabeledTokens | Conversation | Reject
Records = Iterator[tuple[int, Value | None]]
"""Numbers in the slice (of lines or rows, from 1) and values; None for a blank line."""


def decoded(text: str | bytes) -> str | Reject:
    """Return a text, from UTF-8 where it is bytes, or the reject that it is."""
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError:
        return Reject(INVALID_UTF8, excerpt(text))


def excerpt(value: object) -> str:
    """Return how a bad record begins, in printable form."""
    if isinstance(value, bytes):
        value = value[: 4 * _EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    text = value if isinstance(value, str) else repr(value)
    return text[:_EXCERPT_CHARACTERS].encode(errors="backslashreplace").decode()


def without_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: pairs of surrogates joined, a lone one U+FFFD.

    JSON can escape half a character of UTF-16 (an emoji is two escapes), which
    remains where text was cut.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
