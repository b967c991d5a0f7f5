"""`hdp`: every sequence on as few ranks as can hold it, in the manner of ByteScale.

ByteScale (arXiv 2502.21231) merges data and context parallelism: a sequence takes
ceil(length / memory) ranks, and ranks may run different numbers of micro-batches. This is a
reimplementation without its offloading of activations: the longest sequence first, each on the
ranks with the least time so far, in their open micro-batch or a new one. CP groups are those of
the layout. The method suits layouts without a barrier; with one, ranks that finish early wait.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.cost.timing import Placement
from raymix.schedule.layout import Ints, Layout


@planner("hdp")
def hdp(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return every sequence on the fewest ranks that hold it, on the least loaded ones."""
    width_K = cost.min_widths(length_K, layout.widths)
    tokens_K = shard_tokens(length_K, width_K)
    second_K = cost.attention(length_K, width_K) + cost.linear_s * tokens_K
    loads = _OpenMicroBatches(layout.ranks, cost)
    # Lengths fall, so widths never rise: CP groups come first, then single ranks.
    items = zip(width_K.tolist(), tokens_K.tolist(), second_K.tolist(), strict=True)
    micro_K, first_K = np.array([loads.place(*item) for item in items], dtype=np.int64).T
    return Placement(micro_K, first_K, width_K)


class _OpenMicroBatches:
    """Per rank: seconds so far, the open micro-batch and its tokens."""

    def __init__(self, ranks: int, cost: CostModel) -> None:
        self._clock = [0.0] * ranks
        self._micro = [0] * ranks
        self._tokens = [0] * ranks
        self._capacity, self._base_s = cost.memory_tokens, cost.base_s
        self._width = 0
        self._heap: list[tuple[float, int]] = []

    def place(self, width: int, tokens: int, seconds: float) -> tuple[int, int]:
        """Place a sequence on `width` ranks; return its micro-step and its first rank."""
        if width != self._width:
            # One heap at a time is enough, since widths never rise.
            self._width = width
            first_ranks = range(0, len(self._clock), width)
            self._heap = [(max(self._clock[first : first + width]), first) for first in first_ranks]
            heapify(self._heap)
        clock, first = self._heap[0]
        if width == 1:
            return self._place_local(clock, first, tokens, seconds)
        ranks = range(first, first + width)
        micro = max(self._micro[rank] for rank in ranks)
        # A rank whose open micro-batch is an earlier one has no tokens in this micro-step yet.
        open_tokens = max(self._tokens[rank] for rank in ranks if self._micro[rank] == micro)
        if open_tokens + tokens > self._capacity:
            micro += 1
        for rank in ranks:
            is_new = self._micro[rank] != micro or not self._tokens[rank]
            self._tokens[rank] = tokens if is_new else self._tokens[rank] + tokens
            self._micro[rank] = micro
            # base_s once per micro-batch: the linear layers' seconds at zero tokens.
            self._clock[rank] = clock + seconds + is_new * self._base_s
        heapreplace(self._heap, (max(self._clock[rank] for rank in ranks), first))
        return micro, first

    def _place_local(self, clock: float, rank: int, tokens: int, seconds: float) -> tuple[int, int]:
        """Place a sequence on one rank: the same without loops, as most sequences are local."""
        open_tokens = self._tokens[rank]
        if open_tokens + tokens > self._capacity:
            self._micro[rank] += 1
            open_tokens = 0
        self._tokens[rank] = open_tokens + tokens
        self._clock[rank] = clock + seconds + (self._base_s if not open_tokens else 0.0)
        heapreplace(self._heap, (self._clock[rank], rank))
        return self._micro[rank], rank
