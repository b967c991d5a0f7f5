"""Sequence lengths from a file, or from a published distribution by name.

Legend: K sequences.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json
from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.layout import Ints
from raymix.schedule.lengths import known_distributions, sample_lengths

SUFFIXES = (".txt", ".csv", ".json")
_COLUMNS = ("length", "lengths", "tokens")
# Sequences sampled from a published distribution.
_SAMPLE_COUNT = 100_000


def known_source(source: str) -> bool:
    """Return whether `read_lengths` accepts `source`: a distribution, or a file of lengths."""
    return source in known_distributions() or Path(source).suffix.lower() in SUFFIXES


def read_lengths(source: str, *, seed: int = 0) -> Ints:
    """Return the lengths of a source in tokens, shape (K,).

    Args:
        source: A distribution (`known_distributions()`), of which 100,000 are sampled; a text file
            with one length a line; a CSV file with a column `length` or `tokens`, or with a single
            column; or a JSON file with a list, or with an object that has one under such a key.
        seed: Seed of the sample.

    Raises:
        ScheduleError: If it is none of these, or contains an invalid length.
    """
    if source in known_distributions():
        return sample_lengths(source, _SAMPLE_COUNT, seed=seed)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = known_distributions()
        raise ScheduleError.at(
            "lengths",
            source,
            "neither a distribution nor a file of lengths",
            allowed=f"Allowed: {', '.join(known)}, or a file that ends in {', '.join(SUFFIXES)}",
            fix=did_you_mean(source, known),
        )
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ScheduleError.at("lengths", source, "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError.at("lengths", source, f"cannot be read: {error}") from error
    readers = {".txt": _from_text, ".csv": _from_csv, ".json": _from_json}
    return _to_lengths(readers[suffix](text, source), source)


def _from_text(text: str, source: str) -> list[Any]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_csv(text: str, source: str) -> list[Any]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        return []
    names = [name.strip().lower() for name in rows[0]]
    columns = [names.index(name) for name in _COLUMNS if name in names]
    if columns:
        # Short rows give "", so that the error names the entry and not an index of Python.
        return [row[columns[0]] if columns[0] < len(row) else "" for row in rows[1:]]
    if len(names) > 1:
        raise ScheduleError.at(
            "lengths",
            source,
            f"no column of lengths among {', '.join(names)}",
            fix=f"Name one {' or '.join(_COLUMNS)}",
        )
    # A single column needs no header: a first row of digits is a length.
    return [row[0] for row in (rows if names[0].isdecimal() else rows[1:])]


def _from_json(text: str, source: str) -> list[Any]:
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ScheduleError.at("lengths", source, f"not JSON: {error}") from error
    if isinstance(document, dict):
        columns = [document[name] for name in _COLUMNS if name in document]
        document = columns[0] if columns else None
    if not isinstance(document, list):
        raise ScheduleError.at(
            "lengths",
            source,
            "no list of lengths",
            allowed=f"Allowed: a list, or an object with one under {' or '.join(_COLUMNS)}",
        )
    return document


def _to_lengths(values: list[Any], source: str) -> Ints:
    """Return values of a file as integers, or raise with the first invalid entry."""
    if not values:
        raise ScheduleError.at("lengths", source, "the file holds no lengths")
    for number, value in enumerate(values, start=1):
        # By text, as int() would take True, 2.5 and "1_000" without complaint.
        text = "" if isinstance(value, bool) else str(value).strip()
        # `isdecimal`, as `isdigit` is true of "²", which int() refuses.
        if not text.isdecimal() or int(text) < 1:
            raise ScheduleError.at(
                "lengths", source, f"entry {number}, {value!r}, is not a whole number >= 1"
            )
    return np.array([int(value) for value in values], dtype=np.int64)
