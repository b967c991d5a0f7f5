"""Sequence lengths from a file, or from a published distribution by name.

Legend: K sequences.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raymix._utils.json import parse_json
from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.layout import Ints
from raymix.schedule.lengths import known_distributions, sample_lengths

SUFFIXES = (".txt", ".csv", ".json")
# A place in the file, for messages, and what stands there.
_Value = tuple[str, Any]
# More than any sequence has; the sums of a plan stay within 64 bits.
_MAX_LENGTH = 2**40
_COLUMNS = ("length", "lengths", "tokens")
# Sequences sampled from a published distribution.
_SAMPLE_COUNT = 100_000


def known_source(source: str) -> bool:
    """Return whether `read_lengths` accepts `source`: a distribution, or a file of lengths."""
    return source in known_distributions() or Path(source).suffix.lower() in SUFFIXES


def read_lengths(source: str, *, seed: int = 0, note: Callable[[str], None] | None = None) -> Ints:
    """Return the lengths of a source in tokens, shape (K,).

    Args:
        source: A distribution (`known_distributions()`), of which 100,000 are sampled; a text file
            with one length a line, where blank lines and what follows a # are skipped; a CSV file
            with a column `length` or `tokens`, or with a single column; or a JSON file with a list,
            or with an object that has one under such a key.
        seed: Seed of the sample.
        note: Gets a line if lengths of 0 are left out: an empty sequence takes no time.

    Raises:
        ScheduleError: If it is none of these, or contains an invalid length; it names the line.
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
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise ScheduleError.at("lengths", source, "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError.at("lengths", source, f"cannot be read: {error}") from error
    readers = {".txt": _from_text, ".csv": _from_csv, ".json": _from_json}
    length_K = _to_lengths(readers[suffix](text, source), source)
    empty = int(np.count_nonzero(length_K == 0))
    if empty == length_K.size:
        raise ScheduleError.at("lengths", source, f"all {empty:,} lengths in it are 0")
    if empty and note is not None:
        note(f"{source}: {empty:,} of {length_K.size:,} lengths are 0, and left out")
    return length_K[length_K > 0]


def _from_text(text: str, source: str) -> list[_Value]:
    values = []
    for number, line in enumerate(text.splitlines(), start=1):
        if value := line.partition("#")[0].strip():
            values.append((f"line {number}", value))
    return values


def _from_csv(text: str, source: str) -> list[_Value]:
    reader = csv.reader(text.splitlines())
    # The reader's line number: a quoted cell may hold line ends, and blank lines are no rows.
    rows = [(f"line {reader.line_num}", row) for row in reader if any(map(str.strip, row))]
    rows = [(at, row) for at, row in rows if not row[0].lstrip().startswith("#")]
    if not rows:
        return []
    names = [name.strip().lower() for name in rows[0][1]]
    columns = [names.index(name) for name in _COLUMNS if name in names]
    if columns:
        # Short rows give "", so that the error names the line and not an index of Python.
        return [(at, row[columns[0]] if columns[0] < len(row) else "") for at, row in rows[1:]]
    if len(names) > 1:
        raise ScheduleError.at(
            "lengths",
            source,
            f"no column of lengths among {', '.join(names)}",
            fix=f"Name one {' or '.join(_COLUMNS)}",
        )
    # A single column needs no header: a first row that begins as a number does is a length, and an
    # error if it is none.
    headless = names[0][:1] in set("0123456789+-.")
    return [(at, row[0]) for at, row in (rows if headless else rows[1:])]


def _from_json(text: str, source: str) -> list[_Value]:
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
    return [(f"entry {number}", value) for number, value in enumerate(document, start=1)]


def _to_lengths(values: list[_Value], source: str) -> Ints:
    """Return values of a file as integers, or raise with the first invalid one."""
    if not values:
        raise ScheduleError.at("lengths", source, "the file holds no lengths")
    lengths = []
    for at, value in values:
        length = _whole(value)
        if length is None:
            raise ScheduleError.at(
                "lengths",
                source,
                f"{at}, {value!r}, is not a length",
                allowed=f"Allowed: a whole number of tokens, up to {_MAX_LENGTH:,}",
                fix="Mend the line, or take it out",
            )
        lengths.append(length)
    return np.array(lengths, dtype=np.int64)


def _whole(value: Any) -> int | None:
    """Return a value of a file as a whole number from 0 on, None if it is not one."""
    # By text, as int() would take True and "1_000", and float() nan, without complaint.
    text = "" if isinstance(value, bool) else str(value).strip()
    # Tables of numbers are written as 512.0 by tools that know floats alone.
    whole, _, zeros = text.partition(".")
    # `isdecimal`, as `isdigit` is true of "²", which int() refuses.
    if not whole.isdecimal() or zeros.strip("0") or len(whole) > len(str(_MAX_LENGTH)):
        return None
    length = int(whole)
    return length if length <= _MAX_LENGTH else None
