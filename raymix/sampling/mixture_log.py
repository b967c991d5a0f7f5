"""The mixture log: which shares held from which step on, versioned and append-only.

With the seed and the corpus fingerprint it determines every batch, so every checkpoint has it.
On disk (`mixture_log.jsonl`) an entry is a line: version, first_step, shares by name, mixer, stats.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import CorpusError, format_problem

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class MixtureEntry:
    """Shares that hold from a step on."""

    version: int
    """Counts up by one from entry to entry."""
    first_step: int
    """First step with these shares."""
    weights: tuple[float, ...]
    """Share of tokens of each domain, in the log's order of domains, summing to 1."""
    mixer: str
    """Who chose them: a mixer's kind, or `asked` for a request by hand."""
    stats: dict[str, Any] | None = None
    """Statistics they were derived from; JSON types only."""


@dataclass(slots=True)
class MixtureLog:
    """The entries of a run, the first starting at step 0."""

    domains: tuple[str, ...]
    entries: list[MixtureEntry] = field(default_factory=list)
    # First steps once more, for bisection: `at` is called at every step.
    _starts: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        # Through `append`, so that entries from a file are checked like new ones.
        entries = self.entries
        self.entries = []
        for entry in entries:
            self.append(entry)

    def append(self, entry: MixtureEntry) -> None:
        """Add the next entry.

        Raises:
            ValueError: If the version is not the last one's plus 1 (the first: any), the first
                step is not after the last one's (the first: 0), or a domain lacks a weight.
        """
        last = self.entries[-1] if self.entries else None
        if last is None and entry.first_step != 0:
            raise ValueError(f"the first entry must start at step 0, not {entry.first_step}")
        if last is not None and entry.first_step <= last.first_step:
            raise ValueError(
                f"entry {entry.version} starts at step {entry.first_step}, not after the "
                f"last one's step {last.first_step}"
            )
        if last is not None and entry.version != last.version + 1:
            raise ValueError(f"version {entry.version} does not follow version {last.version}")
        if len(entry.weights) != len(self.domains):
            raise ValueError(f"{len(entry.weights)} weights for {len(self.domains)} domains")
        self.entries.append(entry)
        self._starts.append(entry.first_step)

    def at(self, step: int) -> MixtureEntry:
        """Return the entry that holds at `step`.

        Raises:
            ValueError: If the log is empty or `step` is negative.
        """
        return self.entries[self._position(step)]

    def until(self, step: int) -> int | None:
        """Return the first step with other shares than `step` has; None if there is none yet."""
        position = self._position(step) + 1
        return self._starts[position] if position < len(self._starts) else None

    def since(self, version: int) -> list[MixtureEntry]:
        """Return the entries newer than `version`, oldest first; all of them for -1."""
        # A lease carries these; a rank that is up to date gets none.
        return [entry for entry in self.entries if entry.version > version]

    def truncate(self, step: int) -> list[MixtureEntry]:
        """Drop and return the entries that start after `step`."""
        position = bisect_right(self._starts, step)
        dropped = self.entries[position:]
        del self.entries[position:], self._starts[position:]
        return dropped

    def copy(self) -> MixtureLog:
        """Return an independent log with the same entries."""
        return MixtureLog(self.domains, list(self.entries))

    def to_lines(self) -> list[str]:
        """Return one JSON line per entry, without line ends."""
        return [self.to_line(entry) for entry in self.entries]

    def to_line(self, entry: MixtureEntry) -> str:
        """Return an entry as one JSON line; floats survive the round trip exactly."""
        return json.dumps(
            {
                "version": entry.version,
                "first_step": entry.first_step,
                # json writes the shortest text that reads back as the same float.
                "shares": dict(zip(self.domains, entry.weights, strict=True)),
                "mixer": entry.mixer,
                "stats": entry.stats,
            }
        )

    @classmethod
    def from_lines(
        cls, lines: Iterable[str], domains: Sequence[str] | None = None, *, path: str = "log"
    ) -> MixtureLog:
        """Return the log written as `lines`; a torn last line is left out.

        Args:
            lines: What `to_lines` gave; empty lines are skipped.
            domains: Order of the domains; left out, that of the first line.
            path: Where the lines come from, for messages.

        Raises:
            CorpusError: If a line other than the last is not an entry, or names other domains.
        """
        texts = [line for line in lines if line.strip()]
        log = cls(tuple(domains or ()))
        for number, text in enumerate(texts, start=1):
            try:
                raw = parse_json(text)
            except ValueError as error:
                # A process killed in the middle of a write leaves half a line at the end.
                if number == len(texts):
                    break
                raise CorpusError(_bad_line(path, number, text, str(error))) from error
            try:
                log.domains = log.domains or tuple(raw["shares"])
                log.append(_entry(raw, log.domains))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise CorpusError(_bad_line(path, number, text, str(error))) from error
        return log

    def _position(self, step: int) -> int:
        position = bisect_right(self._starts, step) - 1
        if position < 0:
            raise ValueError(f"the mixture log has no weights for step {step}")
        return position


def _entry(raw: dict[str, Any], domains: tuple[str, ...]) -> MixtureEntry:
    shares = raw["shares"]
    if set(shares) != set(domains):
        raise ValueError(f"its domains are {sorted(shares)}, not {sorted(domains)}")
    weights = tuple(float(shares[name]) for name in domains)
    if not (min(weights) >= 0 and abs(sum(weights) - 1) <= _TOLERANCE):
        raise ValueError("its shares are not shares: 0 or more, adding up to 1")
    for key in ("version", "first_step"):
        # Not isinstance: True is an int in Python, and json reads `true`.
        if type(raw[key]) is not int:
            raise ValueError(f"its {key} is {raw[key]!r}, not a whole number")
    return MixtureEntry(
        version=raw["version"],
        first_step=raw["first_step"],
        weights=weights,
        mixer=raw["mixer"],
        stats=raw.get("stats"),
    )


def _bad_line(path: str, number: int, text: str, wrong: str) -> str:
    return format_problem(
        f"{path}:{number}",
        text[:80],
        f"not an entry of a mixture log ({wrong})",
        fix="Restore the file, or start a new run directory",
    )
