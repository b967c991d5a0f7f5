"""Damage, the same every time: what disks, networks and people do to files.

A case is a number. `damaged(raw, case)` is always the same bytes, so a failure is repeated by its
number; `outcome` holds what the code under test did to the rule of the house: it works, or it
raises a RaymixError whose messages have the house's form. Anything else is a defect.
"""

from __future__ import annotations

import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from raymix.errors import RaymixError

T = TypeVar("T")

FORM = re.compile(r"[^\n]+ = .+: .+[.?!]", re.DOTALL)
# More than any case needs, less than a length read from a damaged header asks for.
EXTRA_BYTES = 2 << 30

_WORDS = (
    b"\x00", b"\x00" * 64, b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b"\n\n",
    b"{", b"}", b"[", b"]", b'"', b"\\u0000", b"\\ud800", b",", b":", b"-", b"null", b"true",
    b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 40, b"0x1f", b'{"text": 5}\n', b'"text"',
    b"[" * 3000, b'{"a":' * 2000, b"a" * 20_000, "\u2028\U0001f600é".encode(), b"..", b"/", b"%s",
)  # fmt: skip
_NUMBERS = (b"0", b"-1", b"1", b"18446744073709551615", b"9223372036854775808", b"1e308", b"0.5")


def damaged(raw: bytes, case: int) -> bytes:
    """Return `raw` after one to four damages."""
    chance = random.Random(case)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        raw = chance.choice(_DAMAGES)(raw, chance)
    return raw


def _truncate(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randrange(len(raw) + 1)]


def _flip(raw: bytes, chance: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _insert(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw) + 1)
    return raw[:at] + chance.choice(_WORDS) + raw[at:]


def _replace(raw: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(raw) + 1), chance.choice((1, 2, 4, 8, 40))
    return raw[:at] + chance.choice(_WORDS) + raw[at + length :]


def _remove(raw: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(raw) + 1), chance.choice((1, 2, 16, 500))
    return raw[:at] + raw[at + length :]


def _repeat(raw: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(raw) + 1), chance.randrange(1, 400)
    return raw[: at + length] + raw[at:]


def _number(raw: bytes, chance: random.Random) -> bytes:
    """Put another number in the place of one that stands in a text."""
    numbers = list(re.finditer(rb"\d+", raw[:20_000]))
    if not numbers:
        return _flip(raw, chance)
    hit = chance.choice(numbers)
    return raw[: hit.start()] + chance.choice(_NUMBERS) + raw[hit.end() :]


def _head(raw: bytes, chance: random.Random) -> bytes:
    """Change one of the first bytes, where formats keep lengths and marks."""
    changed = bytearray(raw)
    if changed:
        changed[chance.randrange(min(len(changed), 16))] = chance.choice((0, 1, 127, 128, 255))
    return bytes(changed)


def _tail(raw: bytes, chance: random.Random) -> bytes:
    """Change one of the last bytes, where Parquet and zip keep theirs."""
    return _head(raw[::-1], chance)[::-1]


def _nothing(raw: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"", b"\n", b"\x00", b"null", raw[::-1]))


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncate, _flip, _flip, _insert, _insert, _replace, _replace, _remove, _repeat, _number,
    _number, _head, _tail, _nothing,
)  # fmt: skip


def outcome(work: Callable[[], T], label: str) -> T | None:
    """Return what `work` returns, None if it refused its input as the house does.

    Args:
        work: What reads the damaged input.
        label: Which case it is.
    """
    problems: tuple[str, ...] = ()
    try:
        with bounded_memory():
            return work()
    except RaymixError as error:
        problems = error.problems or ("an error without a message",)
    except BaseException as error:
        error.add_note(label)
        raise
    for message in problems:
        assert FORM.fullmatch(message), f"{label}: {message!r}"
    return None


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let this process have little more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
