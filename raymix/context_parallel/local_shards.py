"""The row of one rank in a micro-batch: whole documents, then its shards of shared documents.

The row is flat: the local documents, then, group by group, the shards of the documents that the
group shares. All ranks of a group have the same number of tokens of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from raymix.context_parallel.groups import ContextParallelGroups, RankGroup
from raymix.context_parallel.segments import AttentionSegment, AttentionSegments
from raymix.schedule.layout import Ints
from raymix.schedule.shard_spans import shard_positions, shard_spans

ExchangeName = Literal["gather", "ulysses"]


@dataclass(frozen=True, slots=True)
class DocumentPart:
    """A document, or a shard of one, in the row of a rank."""

    length: int
    """Tokens of the whole document."""
    ranks: RankGroup
    """The ranks that share it, increasing; a single rank: the document is local."""


class SharedDocuments:
    """The documents that one group of ranks shares in a micro-batch, seen from one member."""

    def __init__(
        self, lengths: Sequence[int], index: int, width: int, group: dist.ProcessGroup
    ) -> None:
        """Describe the documents; `index` is this rank's position in the group of `width` ranks."""
        self.lengths = tuple(lengths)
        self.index = index
        self.width = width
        self.group = group
        # Rounded up: all-gather and all-to-all need shards of equal size.
        self._shard_lengths = tuple(-(-length // width) for length in lengths)
        self.tokens = sum(self._shard_lengths)

    @cached_property
    def shards(self) -> AttentionSegments:
        """Return this rank's queries and the keys they see, in document order."""
        segments, query, key = list[AttentionSegment](), 0, 0
        for length, shard_length in zip(self.lengths, self._shard_lengths, strict=True):
            for first, end in shard_spans(length, self.width, self.index):
                segments.append(AttentionSegment(query, end - first, key, end))
                query += end - first
            key += shard_length * self.width
        return AttentionSegments(segments)

    @cached_property
    def documents(self) -> AttentionSegments:
        """Return one segment per document, the padding to equal shards included."""
        # Padding is at the end of a document, where the causal mask hides it from real tokens.
        return AttentionSegments.of_documents(
            [shard_length * self.width for shard_length in self._shard_lengths]
        )

    def order(self, device: torch.device) -> torch.Tensor:
        """Return the row of each document token in the concatenation of all ranks' rows.

        int64, shape (width * tokens,); the tokens are in document order.
        """
        if device not in self._order:
            self._order[device] = torch.from_numpy(self._rows()).to(device)
        return self._order[device]

    @cached_property
    def _order(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def _rows(self) -> Ints:
        first, rows = 0, list[Ints]()
        for length, shard_length in zip(self.lengths, self._shard_lengths, strict=True):
            document_rows = np.empty(shard_length * self.width, dtype=np.int64)
            for index in range(self.width):
                positions = shard_positions(length, self.width, index)
                document_rows[positions] = index * self.tokens + first + np.arange(shard_length)
            rows.append(document_rows)
            first += shard_length
        return np.concatenate(rows)


class LocalShards:
    """The documents and shards of one rank in a micro-batch, in the order of its row.

    Attributes:
        order: Index in `parts` of each document of the row.
        local: Segments of the local documents.
        shared: The shared documents of each group, in the same order on all ranks.
        exchange: How shared documents are attended to.
        tokens: Tokens in the row.
        longest: Tokens of the longest document: a bound on the distance of a query to a key.
    """

    def __init__(
        self,
        parts: Sequence[DocumentPart],
        rank: int,
        groups: ContextParallelGroups,
        *,
        exchange: ExchangeName = "gather",
    ) -> None:
        """Arrange the documents of a micro-batch of `rank`; none: a row of one token."""
        by_group: dict[RankGroup, list[int]] = {}
        for at, part in enumerate(parts):
            by_group.setdefault(part.ranks if len(part.ranks) > 1 else (), []).append(at)
        local = by_group.pop((), [])
        self.exchange = exchange
        # A rank without documents still runs the model: FSDP gathers parameters on all ranks.
        self.local = AttentionSegments.of_documents(
            [parts[at].length for at in local] if parts else [1]
        )
        # Sorted: the members of a group must issue their collectives in the same order.
        self.shared = tuple(
            SharedDocuments(
                [parts[at].length for at in by_group[ranks]],
                ranks.index(rank),
                len(ranks),
                groups.group(ranks),
            )
            for ranks in sorted(by_group)
        )
        self.order = (*local, *(at for ranks in sorted(by_group) for at in by_group[ranks]))
        self.tokens = self.local.n_queries + sum(shared.tokens for shared in self.shared)
        self.longest = max((part.length for part in parts), default=1)


def local_positions(part: DocumentPart, rank: int) -> Ints:
    """Return the position in the document of each token in the row of `rank`, shape (tokens,).

    Positions from `part.length` on are padding to shards of equal size.
    """
    return shard_positions(part.length, len(part.ranks), part.ranks.index(rank))
