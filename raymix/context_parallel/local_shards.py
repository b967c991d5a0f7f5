"""What one rank holds in a micro-batch: whole documents, and its shards of shared ones.

It is one flat row of tokens: the local documents, then, team by team, the shards of the documents
that the team shares. All ranks of a team have as many tokens of it, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from raymix.context_parallel.groups import ContextParallelGroups, Team
from raymix.context_parallel.segments import AttentionSegment, AttentionSegments
from raymix.schedule.layout import Ints
from raymix.schedule.shard_spans import shard_positions, shard_spans

ExchangeName = Literal["gather", "ulysses"]


@dataclass(frozen=True, slots=True)
class DocumentPart:
    """One document as a rank holds it."""

    length: int
    """Tokens of the whole document."""
    team: Team
    """The ranks that share it, rising; one rank: it is local."""


class SharedDocuments:
    """The documents that one team shares in a micro-batch, as one of its ranks sees them."""

    def __init__(
        self, lengths: Sequence[int], index: int, width: int, group: dist.ProcessGroup
    ) -> None:
        """Say which documents; `index` is this rank's place in the team of `width`."""
        self.lengths = tuple(lengths)
        self.index = index
        self.width = width
        self.group = group
        self._held = tuple(-(-length // width) for length in lengths)
        self.tokens = sum(self._held)

    @cached_property
    def shards(self) -> AttentionSegments:
        """Return this rank's queries and the keys they see, in the order of the documents."""
        pieces, query, key = list[AttentionSegment](), 0, 0
        for length, held in zip(self.lengths, self._held, strict=True):
            for begin, end in shard_spans(length, self.width, self.index):
                pieces.append(AttentionSegment(query, end - begin, key, end))
                query += end - begin
            key += held * self.width
        return AttentionSegments(pieces)

    @cached_property
    def documents(self) -> AttentionSegments:
        """Return the documents as pieces of their own, padding to equal shards included."""
        return AttentionSegments.whole([held * self.width for held in self._held])

    def order(self, device: torch.device) -> torch.Tensor:
        """Return, for each token of the documents in order, its row in what all ranks hold.

        Those rows are the ranks' tokens one rank after the other; int64, shape (width * tokens,).
        """
        if device not in self._order:
            self._order[device] = torch.from_numpy(self._rows()).to(device)
        return self._order[device]

    @cached_property
    def _order(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def _rows(self) -> Ints:
        begin, found = 0, list[Ints]()
        for length, held in zip(self.lengths, self._held, strict=True):
            rows = np.empty(held * self.width, dtype=np.int64)
            for index in range(self.width):
                at = shard_positions(length, self.width, index)
                rows[at] = index * self.tokens + begin + np.arange(held)
            found.append(rows)
            begin += held
        return np.concatenate(found)


class LocalShards:
    """What a rank holds in a micro-batch.

    Attributes:
        order: Which of the documents given comes where in the row.
        local: The local documents.
        shared: What each team shares, in the same order on all ranks.
        exchange: How shared documents are attended to.
        tokens: Tokens in the row.
        longest: Tokens of the longest document; no query is further from a key.
    """

    def __init__(
        self,
        parts: Sequence[DocumentPart],
        rank: int,
        teams: ContextParallelGroups,
        *,
        exchange: ExchangeName = "gather",
    ) -> None:
        """Arrange the documents of a micro-batch of `rank`; none: a row of one token."""
        by_team: dict[Team, list[int]] = {}
        for at, part in enumerate(parts):
            by_team.setdefault(part.team if len(part.team) > 1 else (), []).append(at)
        local = by_team.pop((), [])
        self.exchange = exchange
        self.local = AttentionSegments.whole([parts[at].length for at in local] if parts else [1])
        self.shared = tuple(
            SharedDocuments(
                [parts[at].length for at in by_team[team]],
                team.index(rank),
                len(team),
                teams.group(team),
            )
            for team in sorted(by_team)
        )
        self.order = (*local, *(at for team in sorted(by_team) for at in by_team[team]))
        self.tokens = self.local.queries + sum(shared.tokens for shared in self.shared)
        self.longest = max((part.length for part in parts), default=1)


def local_positions(part: DocumentPart, rank: int) -> Ints:
    """Return the position in the document of each token that `rank` holds of it.

    Positions from `part.length` on are padding to shards of equal size.
    """
    return shard_positions(part.length, len(part.team), part.team.index(rank))
