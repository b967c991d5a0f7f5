"""The mixture log: which shares held from which step on, versioned and append-only.

With the seed and the corpus fingerprint it determines every batch, so every checkpoint has it.
On disk (`mixture_log.jsonl`) an entry is a line: version, first_step, shares by name, mixer, stats.

A run whose domains change has an entry there whose `stats.domains` names those added and removed.
The entries before it have the domains of their time: a log of their own, `MixtureLog.earlier`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import CorpusError, format_problem

DOMAINS_CHANGE = "domains"
"""Key in the `stats` of the first entry with other domains: those added and those removed."""

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
    """The entries of a run since its domains are these."""

    domains: tuple[str, ...]
    entries: list[MixtureEntry] = field(default_factory=list)
    earlier: MixtureLog | None = None
    """Log of the steps before, with other domains; None where they never changed."""
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
                step is not after the last one's, or a domain lacks a weight.
        """
        entries = self.entries or (self.earlier.entries if self.earlier else ())
        last = entries[-1] if entries else None
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
            ValueError: If the log is empty, or begins after `step`.
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
        return MixtureLog(self.domains, list(self.entries), self.earlier)

    def to_lines(self) -> list[str]:
        """Return one JSON line per entry, without line ends, earlier ones first."""
        earlier = self.earlier.to_lines() if self.earlier else []
        return earlier + [self.to_line(entry) for entry in self.entries]

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
            domains: Order of the domains; left out, that of the first line that has them.
            path: Where the lines come from, for messages.

        Raises:
            CorpusError: If a line other than the last is not an entry, or names other domains than
                the lines before without saying so, or the last entries are not of `domains`.
        """
        log, begins = cls(tuple(domains or ())), (1, "")
        for number, text, raw in _parsed(lines, path):
            try:
                names = tuple(raw["shares"])
                ordered = tuple(domains) if domains and set(names) == set(domains) else names
                if log.entries and DOMAINS_CHANGE in (raw.get("stats") or {}):
                    log, begins = cls(ordered, earlier=log), (number, text)
                elif not log.entries:
                    log, begins = cls(ordered), (number, text)
                    if raw["first_step"] != 0:
                        raise ValueError("the first entry must start at step 0")
                log.append(_entry(raw, log.domains))
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise CorpusError(_bad_line(path, number, text, str(error))) from error
        if domains and set(log.domains) != set(domains):
            wrong = _other_domains(log.domains, domains)
            raise CorpusError(_bad_line(path, *begins, wrong))
        return log

    def joined(self) -> MixtureLog:
        """Return one log of all steps, whatever the domains were: a share of 0 where absent.

        The domains of today come first, then those of before. Per-domain lists in `stats` are in
        that order too, with None for an absent domain.
        """
        logs, log = list[MixtureLog](), self
        while log is not None:
            logs.append(log)
            log = log.earlier
        names = tuple(dict.fromkeys(name for log in logs for name in log.domains))
        entries = [
            _spread(entry, log.domains, names) for log in reversed(logs) for entry in log.entries
        ]
        return MixtureLog(names, entries)

    def _position(self, step: int) -> int:
        position = bisect_right(self._starts, step) - 1
        if position < 0:
            raise ValueError(f"the mixture log has no weights for step {step}")
        return position


def _parsed(lines: Iterable[str], path: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number, text and JSON of each line that is not empty."""
    texts = [line for line in lines if line.strip()]
    for number, text in enumerate(texts, start=1):
        try:
            yield number, text, parse_json(text)
        except ValueError as error:
            # A process killed in the middle of a write leaves half a line at the end.
            if number == len(texts):
                return
            raise CorpusError(_bad_line(path, number, text, str(error))) from error


def _spread(entry: MixtureEntry, own: Sequence[str], names: Sequence[str]) -> MixtureEntry:
    """Return an entry of the domains `own` as one of `names`, which has them and others."""
    if tuple(own) == tuple(names):
        return entry
    share = dict(zip(own, entry.weights, strict=True))
    stats = entry.stats and {
        key: [dict(zip(own, value, strict=True)).get(name) for name in names]
        if isinstance(value, list) and len(value) == len(own)
        else value
        for key, value in entry.stats.items()
    }
    weights = tuple(share.get(name, 0.0) for name in names)
    return replace(entry, weights=weights, stats=stats)


def _other_domains(found: Iterable[str], wanted: Iterable[str]) -> str:
    return f"its domains are {sorted(found)}, not {sorted(wanted)}"


def _entry(raw: dict[str, Any], domains: tuple[str, ...]) -> MixtureEntry:
    shares = raw["shares"]
    if set(shares) != set(domains):
        raise ValueError(_other_domains(shares, domains))
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
