"""The facts of a domain in the manifest: its splits, and what became of its records."""

from __future__ import annotations

from collections.abc import Sequence

from raymix.corpus.passes import rejects
from raymix.corpus.passes.select import Selection
from raymix.corpus.passes.tokenize import PartCounts
from raymix.store import DomainInfo, SplitInfo


def record_counts(part_counts: Sequence[PartCounts], selection: Selection) -> dict[str, int]:
    """Return the records of a domain and what became of those that were not used."""
    return {
        "records_read": sum(counts.records for counts in part_counts),
        "rejected": sum(rejects.by_reason(part_counts).values()),
        "duplicates": selection.duplicates,
        "too_short": sum(counts.too_short for counts in part_counts),
        "too_long": sum(counts.too_long for counts in part_counts),
        "repaired": sum(counts.repaired for counts in part_counts),
    }


def domain_info(
    part_counts: Sequence[PartCounts], selection: Selection, train: SplitInfo, valid: SplitInfo
) -> DomainInfo:
    """Return the facts of a domain for the manifest."""
    return DomainInfo(
        train=train,
        valid=valid,
        rejected_by_reason=rejects.by_reason(part_counts),
        token_files=(),
        **record_counts(part_counts, selection),
    )
