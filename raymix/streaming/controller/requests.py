"""Requests for shares, as they are saved and as they stand in a mixture log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymix.errors import CorpusError
from raymix.sampling import MixtureLog

REQUESTED = "asked"
"""`MixtureEntry.mixer` of entries that a user requested."""

SharesTuple = tuple[float, ...]


def parse_requests(raw: Mapping[Any, Iterable[float]]) -> dict[int, SharesTuple]:
    """Return saved requests: shares by first step."""
    # JSON turns the keys of a mapping into strings.
    return {int(step): tuple(map(float, shares)) for step, shares in raw.items()}


def logged_requests(lines: Sequence[str], domains: tuple[str, ...]) -> dict[int, SharesTuple]:
    """Return the requests in a log; none if it is of other domains."""
    try:
        entries = MixtureLog.from_lines(lines, domains).entries
    except CorpusError:
        return {}
    return {entry.first_step: entry.weights for entry in entries if entry.mixer == REQUESTED}
