"""Skrull (arXiv 2505.19609, NeurIPS 2025): DACP in a micro-batch, GDS over the global batch.

As printed, the algorithms overrun memory and leave micro-batch counts unequal. What is repaired:

* RollBack, which turns a local sequence into a sharded one, prints RB <- RB - S + S/N on the rank
  that held it; the sign must be + S - S/N. It never charges the other N - 1 ranks: a rank is then
  promised room it does not have. Here every rank is charged, tokens and time, and while a rank is
  over its memory its longest local sequence is rolled back (not the first found).
* Ranks with fewer micro-batches get empty ones, as `Schedule` does for all planners.
* Where the printed search for a number of micro-batches has no exit, this one stops at the first
  that fits.

`dacp(..., paper_exact=True)` is the printed one with only the sign put right.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import Draft, fewest, over_groups, strided
from raymix.schedule.layout import Ints, Layout

SHARDED = -1


class _BucketLoads:
    """The ranks of one group while DACP fills them: room in tokens and load in seconds."""

    def __init__(self, length_K: Ints, ranks: int, cost: CostModel, *, paper_exact: bool) -> None:
        self.room = [cost.memory_tokens] * ranks
        self.load = [0.0] * ranks
        self.of_K = [SHARDED] * length_K.size
        self._ranks = range(ranks)
        self._paper_exact = paper_exact
        self._length = length_K.tolist()
        self._share = shards(length_K, ranks).tolist()
        self._whole_s = cost.work(length_K).tolist()
        linear = cost.linear_s * np.array(self._share)
        self._part_s = (cost.attention(length_K, ranks) + linear).tolist()

    def keep(self, k: int) -> bool:
        """Place a sequence whole: where load is least, else where room is most."""
        loaded = min(self._ranks, key=self.load.__getitem__)
        roomy = max(self._ranks, key=self.room.__getitem__)
        for rank in (loaded, roomy):
            if self.room[rank] >= self._length[k]:
                self._charge(rank, self._length[k], self._whole_s[k])
                self.of_K[k] = rank
                return True
        return False

    def shard(self, k: int) -> None:
        """Spread a sequence over all ranks."""
        for rank in self._ranks:
            self._charge(rank, self._share[k], self._part_s[k])
        self.of_K[k] = SHARDED

    def share(self, k: int) -> int:
        return self._share[k]

    def roll_back(self, rank: int) -> bool:
        """Shard a local sequence of `rank`; return False if it has none."""
        held = [k for k, at in enumerate(self.of_K) if at == rank]
        if not held:
            return False
        if self._paper_exact:
            # The first found of those visited from short to long; nobody else is charged.
            k = held[-1]
            self.room[rank] += self._length[k] - self._share[k]
            self.of_K[k] = SHARDED
            return True
        k = held[0]
        self._charge(rank, -self._length[k], -self._whole_s[k])
        self.shard(k)
        return True

    def _charge(self, rank: int, tokens: int, seconds: float) -> None:
        self.room[rank] -= tokens
        self.load[rank] += seconds


def dacp(
    length_K: Ints, ranks: int, cost: CostModel, *, paper_exact: bool = False
) -> list[int] | None:
    """Return the rank of each sequence of a micro-batch, or SHARDED; None if it finds no way.

    Algorithms 1 and 3: local where possible, balancing time before memory, from short to long.

    Args:
        length_K: Tokens, longest first, shape (K,).
        ranks: Ranks in the group, N.
        cost: Its work stands for the paper's FLOPs, its memory for BucketSize.
        paper_exact: Roll back as printed but for the sign; ranks may then hold too much.
    """
    state = _BucketLoads(length_K, ranks, cost, paper_exact=paper_exact)
    for k in reversed(range(length_K.size)):
        while not state.keep(k):
            tightest = min(range(ranks), key=state.room.__getitem__)
            if state.room[tightest] >= state.share(k):
                state.shard(k)
                break
            if not state.roll_back(tightest):
                return None
    while not paper_exact and min(state.room) < 0:
        if not state.roll_back(min(range(ranks), key=state.room.__getitem__)):
            return None
    return state.of_K


def gds(
    length_K: Ints, layout: Layout, cost: CostModel, *, paper_exact: bool = False
) -> list[tuple[Ints, list[int]]]:
    """Return the micro-batches of one group, algorithm 2: sequences and their ranks by `dacp`.

    The fewest micro-batches, each of every n-th sequence, for which `dacp` finds a way.
    """
    n = fewest(length_K, layout, cost)
    while True:
        parts = strided(length_K, n, layout, cost) or []
        found = [dacp(length_K[x], layout.context, cost, paper_exact=paper_exact) for x in parts]
        seated = [(x, ranks) for x, ranks in zip(parts, found, strict=True) if ranks is not None]
        if seated and len(seated) == len(parts):
            return seated
        n += 1


@planner("skrull")
def skrull(
    length_K: Ints, layout: Layout, cost: CostModel, *, paper_exact: bool = False
) -> Placement:
    """Return Skrull's placement: work balanced over groups, then `gds` in each."""
    draft = Draft(length_K.size, layout)
    whole = layout.slots.width_T.size - 1
    for group, ids in enumerate(over_groups(length_K, layout, cost)):
        if not ids.size:
            continue
        seated = gds(length_K[ids], layout, cost, paper_exact=paper_exact)
        for micro, (part, ranks) in enumerate(seated):
            slot_K = np.array([whole if at == SHARDED else at for at in ranks])
            draft.seat(ids[part], group, micro, slot_K)
    return draft.done()
