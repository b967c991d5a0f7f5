"""Special tokens written out in the contents of a conversation, which stay text.

A user may write `<|im_end|>`; that must not end a turn. Before rendering, a character of the
private-use area (the guard) is put into each special token that a content spells out. What
the template itself writes has none, so both can be told apart in the rendered text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from raymix.corpus.chats.messages import ANSWERS, Conversation, mapped

Span = tuple[int, int]
"""Range of characters [first, last) of a rendered conversation."""

MARK = "\uf8f1\uf8f3\uf8f2"
"""Put into the special tokens that a template writes; see `marked`."""

_GUARDS = range(0xE000, 0xF800)
# The assistant spells out the reasoning that templates look for in its content.
_REASONING = ("<think>", "</think>")


class SpecialTokens:
    """The special tokens of a tokenizer, to be looked for in text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """Look for `tokens`."""
        # The longest first: one may begin another.
        self.tokens = sorted((token for token in set(tokens) if token), key=lambda t: (-len(t), t))
        self._any = _pattern(self.tokens)
        self._in_answers = _pattern([t for t in self.tokens if t not in _REASONING])

    def guarded(self, chat: Conversation) -> tuple[Conversation, str]:
        """Return the conversation with the guard in its special tokens, and the guard.

        The conversation is the same and the guard empty where it spells out none.
        """
        if self._any is None or not any(self._any.search(text) for text in _strings(
            [chat.messages, chat.tools]
        )):  # fmt: skip
            return chat, ""
        every = "".join(_strings([chat.messages, chat.tools]))
        guard = next(
            chr(code)
            for code in _GUARDS
            if not any(form in every for form in _guard_forms(chr(code)))
        )
        messages = tuple(
            _guarded(message, self._in_answers if message["role"] == ANSWERS else self._any, guard)
            for message in chat.messages
        )
        tools = tuple(_guarded(tool, self._any, guard) for tool in chat.tools)
        return replace(chat, messages=messages, tools=tools), guard

    def marked(self, text: str, spans: Sequence[Span], guard: str) -> tuple[str, list[Span]]:
        """Return a text with `MARK` in the template's special tokens and no guards, and its spans.

        Args:
            text: A rendered conversation with guards in its contents.
            spans: Ranges of its characters, rising and apart.
            guard: The guard.
        """
        pieces: list[str] = []
        before_C, after_C = [0], [0]
        guards = _guard_forms(guard)
        pattern = re.compile("|".join(map(re.escape, [*self.tokens, *guards])))
        end = 0
        for match in pattern.finditer(text):
            token = match.group()
            pieces += [text[end : match.start()], "" if token in guards else mark(token)]
            end = match.end()
            before_C += [match.start(), end]
            size = len(pieces[-2])
            after_C += [after_C[-1] + size, after_C[-1] + size + len(pieces[-1])]
        pieces.append(text[end:])
        edges = [_moved(edge, before_C, after_C) for span in spans for edge in span]
        return "".join(pieces), list(zip(edges[::2], edges[1::2], strict=True))


def _guard_forms(guard: str) -> tuple[str, str]:
    # Templates may write contents as JSON of ASCII characters.
    return guard, json.dumps(guard)[1:-1]


def without_guard(text: str, guard: str) -> str:
    """Return a rendered text as it reads, without its guards; `guard` is empty for none."""
    for form in _guard_forms(guard) if guard else ():
        text = text.replace(form, "")
    return text


def mark(token: str) -> str:
    """Return a special token with `MARK` in it."""
    return token[0] + MARK + token[1:]


def _moved(edge: int, before_C: Sequence[int], after_C: Sequence[int]) -> int:
    """Return where a place of one text is in the other; a place in a token is at its beginning."""
    number = bisect_right(before_C, edge) - 1
    inside_token = number % 2 == 1
    return after_C[number] if inside_token else after_C[number] + edge - before_C[number]


def _pattern(tokens: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _guarded(value: Any, pattern: re.Pattern[str] | None, guard: str) -> Any:
    if pattern is None:
        return value
    return mapped(value, lambda text: pattern.sub(lambda m: m[0][0] + guard + m[0][1:], text))
