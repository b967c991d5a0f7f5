"""`skrull`: DACP in a micro-batch, GDS over the global batch (arXiv 2505.19609, NeurIPS 2025).

The printed algorithms exceed memory and leave unequal micro-batch counts. The corrections:

* RollBack, which turns a local sequence into a sharded one, prints RB <- RB - S + S/N on the rank
  of the sequence; the sign must be + S - S/N. It also never charges the other N - 1 ranks, which
  then seem to have free memory that is in use. Here every rank is charged, tokens and time, and
  while a rank exceeds its memory its longest local sequence is rolled back (not the first).
* Ranks with fewer micro-batches get empty ones, as in all schedules.
* The printed search for the number of micro-batches has no exit; here it ends at the first that
  fits.

`dacp(..., paper_exact=True)` is the printed algorithm with only the sign corrected.

Legend: K sequences, N ranks of a group.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import (
    PlacementBuilder,
    balance_groups,
    min_micro_batches,
    split_strided,
)
from raymix.schedule.layout import Ints, Layout

SHARDED = -1
"""In place of a rank: sharded over the whole group."""


class _BucketLoads:
    """State of DACP: free tokens and seconds of work of the ranks of one group."""

    def __init__(self, length_K: Ints, ranks: int, cost: CostModel, *, paper_exact: bool) -> None:
        self.free = [cost.memory_tokens] * ranks
        self.load_s = [0.0] * ranks
        self.rank_of = [SHARDED] * length_K.size
        self._ranks = range(ranks)
        self._paper_exact = paper_exact
        self._length = length_K.tolist()
        self.shard_tokens = shard_tokens(length_K, ranks).tolist()
        self._local_s = cost.work(length_K).tolist()
        linear = cost.linear_s * np.array(self.shard_tokens)
        self._shard_s = (cost.attention(length_K, ranks) + linear).tolist()

    def try_local(self, k: int) -> bool:
        """Place a sequence on the least loaded rank, else on the one with most free memory."""
        least_loaded = min(self._ranks, key=self.load_s.__getitem__)
        most_free = max(self._ranks, key=self.free.__getitem__)
        for rank in (least_loaded, most_free):
            if self.free[rank] >= self._length[k]:
                self._charge(rank, self._length[k], self._local_s[k])
                self.rank_of[k] = rank
                return True
        return False

    def shard(self, k: int) -> None:
        """Shard a sequence over all ranks."""
        for rank in self._ranks:
            self._charge(rank, self.shard_tokens[k], self._shard_s[k])
        self.rank_of[k] = SHARDED

    def roll_back(self, rank: int) -> bool:
        """Shard a local sequence of `rank`; return False if it has none."""
        local = [k for k, assigned in enumerate(self.rank_of) if assigned == rank]
        if not local:
            return False
        if self._paper_exact:
            # As printed: the first in the order of visits, from short to long, and no other rank
            # is charged.
            k = local[-1]
            self.free[rank] += self._length[k] - self.shard_tokens[k]
            self.rank_of[k] = SHARDED
            return True
        # The longest frees the most memory, so fewer sequences have to be sharded.
        k = local[0]
        self._charge(rank, -self._length[k], -self._local_s[k])
        self.shard(k)
        return True

    def _charge(self, rank: int, tokens: int, seconds: float) -> None:
        self.free[rank] -= tokens
        self.load_s[rank] += seconds


def dacp(
    length_K: Ints, ranks: int, cost: CostModel, *, paper_exact: bool = False
) -> list[int] | None:
    """Return the rank of each sequence of a micro-batch, or SHARDED; None if none fits.

    Algorithms 1 and 3: local where possible, balancing time before memory, from short to long.

    Args:
        length_K: Tokens, longest first, shape (K,).
        ranks: Ranks in the group, N.
        cost: Its work stands for the paper's FLOPs, its memory for BucketSize.
        paper_exact: Roll back as printed but for the sign; ranks may then exceed their memory.
    """
    loads = _BucketLoads(length_K, ranks, cost, paper_exact=paper_exact)
    for k in reversed(range(length_K.size)):
        # Each roll-back leaves fewer local sequences, so this ends.
        while not loads.try_local(k):
            fullest = min(range(ranks), key=loads.free.__getitem__)
            if loads.free[fullest] >= loads.shard_tokens[k]:
                loads.shard(k)
                break
            if not loads.roll_back(fullest):
                return None
    # A roll-back charges the other ranks, which may have become too full by it.
    while not paper_exact and min(loads.free) < 0:
        if not loads.roll_back(min(range(ranks), key=loads.free.__getitem__)):
            return None
    return loads.rank_of


def gds(
    length_K: Ints, layout: Layout, cost: CostModel, *, paper_exact: bool = False
) -> list[tuple[Ints, list[int]]]:
    """Return the micro-batches of one group, algorithm 2: sequences and their ranks by `dacp`.

    The fewest micro-batches, each of every n-th sequence, for which `dacp` succeeds.
    """
    n_parts = min_micro_batches(length_K, layout, cost)
    while True:
        parts = split_strided(length_K, n_parts, layout, cost) or []
        ranks_by_part = [
            dacp(length_K[part], layout.context, cost, paper_exact=paper_exact) for part in parts
        ]
        assigned = [
            (part, ranks)
            for part, ranks in zip(parts, ranks_by_part, strict=True)
            if ranks is not None
        ]
        if assigned and len(assigned) == len(parts):
            return assigned
        n_parts += 1


@planner("skrull")
def skrull(
    length_K: Ints, layout: Layout, cost: CostModel, *, paper_exact: bool = False
) -> Placement:
    """Return Skrull's placement: work balanced over groups, then `gds` in each."""
    builder = PlacementBuilder(length_K.size, layout)
    group_slot = layout.slots.width_T.size - 1
    for group, ids in enumerate(balance_groups(length_K, layout, cost)):
        # `gds` would not end for a group without sequences: no part counts as success.
        if not ids.size:
            continue
        for micro, (part, ranks) in enumerate(
            gds(length_K[ids], layout, cost, paper_exact=paper_exact)
        ):
            # Slots 0 to N - 1 are the single ranks.
            slot_K = np.array([group_slot if rank == SHARDED else rank for rank in ranks])
            builder.place(ids[part], group, micro, slot_K)
    return builder.build()
