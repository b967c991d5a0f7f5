"""Bad records: shown in `DOMAIN/rejects.jsonl`, and fatal above the share the recipe allows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from raymix.corpus.passes.tokenize import NO_ANSWER, REJECTS_KEPT, PartCounts, read_counts
from raymix.corpus.read.parts import Part
from raymix.corpus.read.records import INVALID_UTF8
from raymix.errors import format_problem
from raymix.store import atomic_write_text
from raymix.store.remote import files

FILE = "rejects.jsonl"


def by_reason(counts_of_parts: Iterable[PartCounts]) -> dict[str, int]:
    """Return the bad records of a domain by reason, the commonest first."""
    total: Counter[str] = Counter()
    for part_counts in counts_of_parts:
        total.update(part_counts.rejected)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def examples(
    parts: Sequence[Part], counts_of_parts: Sequence[PartCounts]
) -> Iterator[dict[str, Any]]:
    """Yield the bad records that the parts kept, in source order, numbered within their files."""
    file, before = "", 0
    for part, part_counts in zip(parts, counts_of_parts, strict=True):
        part_examples = iter(read_counts(part_counts.base).examples if part_counts.rejected else ())
        example = next(part_examples, None)
        for number, (file_slice, lines) in enumerate(
            zip(part.slices, part_counts.lines, strict=True)
        ):
            if file_slice.file.url != file:
                file, before = file_slice.file.url, 0
            unit = "row" if file_slice.file.format in ("parquet", "arrow", "csv") else "line"
            while example is not None and example["slice"] == number:
                shown = {"reason": example["reason"], "excerpt": example["excerpt"]}
                yield {"file": file, unit: before + example["line"], **shown}
                example = next(part_examples, None)
            before += lines


def write_rejects(
    corpus: str, parts: Sequence[Part], counts_of_parts: Sequence[PartCounts]
) -> list[dict[str, Any]]:
    """Return up to 100 bad records of a domain, some of every reason, having written them."""
    limits = {
        reason: min(count, REJECTS_KEPT) for reason, count in by_reason(counts_of_parts).items()
    }
    by_kind: dict[str, list[dict[str, Any]]] = {reason: [] for reason in limits}
    for example in examples(parts, counts_of_parts) if limits else ():
        of_reason = by_kind[example["reason"]]
        if len(of_reason) < limits[example["reason"]]:
            of_reason.append(example)
            if sum(map(len, by_kind.values())) == sum(limits.values()):
                break
    # An equal share per reason first, so that a rare kind is not crowded out by a common one.
    each = REJECTS_KEPT // max(len(by_kind), 1)
    first = chain.from_iterable(group[:each] for group in by_kind.values())
    rest = chain.from_iterable(group[each:] for group in by_kind.values())
    chosen = list(islice(chain(first, rest), REJECTS_KEPT))
    path = files.join(corpus, parts[0].domain, FILE)
    if chosen:
        text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in chosen)
        atomic_write_text(path, text)
    else:
        files.remove(path)
    return chosen


def too_many(
    domain: str,
    counts_of_parts: Sequence[PartCounts],
    shown: Sequence[dict[str, Any]],
    limit: float,
) -> list[str]:
    """Return the message for a domain with more than the allowed share of bad records, if so."""
    records = sum(part_counts.records for part_counts in counts_of_parts)
    reasons = by_reason(counts_of_parts)
    # Counted and left out, but not bad: some conversations end before their first answer.
    reasons.pop(NO_ANSWER, None)
    bad = sum(reasons.values())
    # A product, not a quotient: a domain may have no records at all.
    if bad <= limit * records:
        return []
    counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
    # Of the commonest reason, which comes first.
    first = next(example for example in shown if example["reason"] != NO_ANSWER)
    unit = "row" if "row" in first else "line"
    advice = _ADVICE.get(first["reason"], "Correct the source")
    return [
        format_problem(
            "file",
            first["file"],
            f"{unit} {first[unit]}: {first['reason']}: {first['excerpt']!r}",
            allowed=f"corpus.max_rejected = {limit}, and {bad:,} of {records:,} records of domain "
            f"{domain!r} are bad ({counts})",
            fix=f"{advice}, or raise the limit; more are in {domain}/{FILE}",
        )
    ]


_ADVICE = {
    INVALID_UTF8: "Convert the file, from Latin-1 by: iconv -f WINDOWS-1252 -t UTF-8 FILE",
}
