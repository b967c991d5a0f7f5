"""`hdp`: every sequence on as few ranks as can hold it, in the manner of ByteScale.

ByteScale (arXiv 2502.21231) merges data and context parallelism: a sequence takes
ceil(length / memory) ranks, and ranks need not do the same number of micro-batches. This is a
retelling, without its offloading of activations: the longest first, each to the ranks that are
furthest behind, in the micro-batch these have open or a new one. Teams are those the layout allows.
It shines without a barrier after each micro-step; with one, ranks that are done sooner wait.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.cost.timing import Placement
from raymix.schedule.layout import Ints, Layout


@planner("hdp")
def hdp(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return every sequence on the fewest ranks that hold it, always those furthest behind."""
    width_K = cost.narrowest(length_K, layout.widths)
    share_K = shards(length_K, width_K)
    second_K = cost.attention(length_K, width_K) + cost.linear_s * share_K
    ranks = _RankLoads(layout.ranks, cost)
    # Widths never grow from long to short: teams come first, then single ranks.
    items = zip(width_K.tolist(), share_K.tolist(), second_K.tolist(), strict=True)
    placed = [ranks.place(*item) for item in items]
    micro_K, first_K = np.array(placed, dtype=np.int64).T
    return Placement(micro_K, first_K, width_K)


class _RankLoads:
    """How far the ranks are: seconds, the micro-batch that is open, and the tokens it holds."""

    def __init__(self, ranks: int, cost: CostModel) -> None:
        self._clock = [0.0] * ranks
        self._open = [0] * ranks
        self._held = [0] * ranks
        self._room, self._base_s = cost.memory_tokens, cost.base_s
        self._width = 0
        self._behind: list[tuple[float, int]] = []

    def place(self, width: int, share: int, seconds: float) -> tuple[int, int]:
        """Place a sequence on `width` ranks; return its micro-step and its first rank."""
        if width != self._width:
            self._width = width
            firsts = range(0, len(self._clock), width)
            self._behind = [(max(self._clock[at : at + width]), at) for at in firsts]
            heapify(self._behind)
        clock, first = self._behind[0]
        if width == 1:
            return self._alone(clock, first, share, seconds)
        team = range(first, first + width)
        micro = max(self._open[rank] for rank in team)
        # A rank that has not come as far holds nothing yet in that micro-step.
        held = max(self._held[rank] for rank in team if self._open[rank] == micro)
        if held + share > self._room:
            micro += 1
        for rank in team:
            fresh = self._open[rank] != micro or not self._held[rank]
            self._held[rank] = share if fresh else self._held[rank] + share
            self._open[rank] = micro
            self._clock[rank] = clock + seconds + fresh * self._base_s
        heapreplace(self._behind, (max(self._clock[rank] for rank in team), first))
        return micro, first

    def _alone(self, clock: float, rank: int, share: int, seconds: float) -> tuple[int, int]:
        """Place a sequence on one rank: the same in short, as most are placed so."""
        held = self._held[rank]
        if held + share > self._room:
            self._open[rank] += 1
            held = 0
        self._held[rank] = held + share
        self._clock[rank] = clock + seconds + (self._base_s if not held else 0.0)
        heapreplace(self._behind, (self._clock[rank], rank))
        return self._open[rank], rank
