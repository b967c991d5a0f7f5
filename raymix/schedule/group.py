"""What several planners share: balance over groups, cutting a group's share into micro-batches.

Legend: K sequences, G groups, N ranks of a group. All lengths come longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.cost.timing import Placement
from raymix.schedule.layout import Floats, Ints, Layout


def least_loaded(work_K: Floats, bins: int) -> list[Ints]:
    """Return the members of each bin: the largest first, each to the bin with the least so far."""
    order = np.argsort(-work_K, kind="stable")
    heap = [(0.0, at) for at in range(bins)]
    heapify(heap)
    members: list[list[int]] = [[] for _ in range(bins)]
    for k, work in zip(order.tolist(), work_K[order].tolist(), strict=True):
        load, at = heap[0]
        members[at].append(k)
        heapreplace(heap, (load + work, at))
    return [np.sort(np.array(ids, dtype=np.int64)) for ids in members]


def over_groups(length_K: Ints, layout: Layout, cost: CostModel) -> list[Ints]:
    """Return the sequences of each group, their work balanced (LPT), on the narrowest teams."""
    narrow_K = cost.narrowest(length_K, layout.widths)
    return least_loaded(cost.work(length_K, narrow_K), layout.groups)


def fewest(length_K: Ints, layout: Layout, cost: CostModel) -> int:
    """Return how many micro-batches of one group the sequences need at least, sharded."""
    return max(1, -(-int(shards(length_K, layout.context).sum()) // cost.memory_tokens))


def strided(length_K: Ints, n: int, layout: Layout, cost: CostModel) -> list[Ints] | None:
    """Return n micro-batches, each with short and long sequences, or None if one does not fit.

    Skrull's algorithm 2: every n-th of the sorted sequences.
    """
    parts = [np.arange(length_K.size)[at::n] for at in range(n)]
    share_K = shards(length_K, layout.context)
    fits = all(int(share_K[ids].sum()) <= cost.memory_tokens for ids in parts)
    return parts if fits else None


def balanced(length_K: Ints, n: int, layout: Layout, cost: CostModel) -> list[Ints] | None:
    """Return n micro-batches of about equal work, or None where this greedy way finds none.

    The longest first, each to the micro-batch of the least work that has room.
    """
    share_K = shards(length_K, layout.context).tolist()
    work_K = cost.work(length_K).tolist()
    heap, room = [(0.0, at) for at in range(n)], [cost.memory_tokens] * n
    parts: list[list[int]] = [[] for _ in range(n)]
    for k, (share, work) in enumerate(zip(share_K, work_K, strict=True)):
        full = []
        while heap and room[heap[0][1]] < share:
            full.append(heappop(heap))
        if not heap:
            return None
        load, at = heap[0]
        heapreplace(heap, (load + work, at))
        parts[at].append(k)
        room[at] -= share
        for item in full:
            heappush(heap, item)
    return [np.array(ids, dtype=np.int64) for ids in parts]


def alike(length_K: Ints, n: int, layout: Layout, cost: CostModel) -> list[Ints] | None:
    """Return n micro-batches of sequences of like length and about equal work, or None.

    FlexSP's way: where lengths are alike, ranks are balanced with nothing sharded.
    """
    share = shards(length_K, layout.context).tolist()
    work = cost.work(length_K)
    goal = ((work.cumsum() - work / 2) * n / work.sum()).tolist()
    runs: list[list[int]] = []
    held = cost.memory_tokens
    for k, tokens in enumerate(share):
        held += tokens
        # A run also ends when the ranks are full.
        if held > cost.memory_tokens or goal[k] >= len(runs):
            runs.append([])
            held = tokens
        runs[-1].append(k)
    return [np.array(run, dtype=np.int64) for run in runs] if len(runs) <= n else None


Split = Callable[[Ints, int, Layout, CostModel], list[Ints] | None]


def first_split(
    length_K: Ints, layout: Layout, cost: CostModel, splits: Sequence[Split]
) -> list[Ints]:
    """Return the fewest micro-batches that one of the ways to split finds.

    One sequence per micro-batch always fits, so there is an end to the search.
    """
    n = fewest(length_K, layout, cost)
    while True:
        for split in splits:
            if (parts := split(length_K, n, layout, cost)) is not None:
                return parts
        n += 1


class Draft:
    """A placement while it is made; sequences by position, longest first."""

    def __init__(self, n_sequences: int, layout: Layout) -> None:
        """Begin with nothing placed."""
        self.layout = layout
        self.micro_K = np.full(n_sequences, -1, dtype=np.int64)
        self.first_K = np.zeros(n_sequences, dtype=np.int64)
        self.width_K = np.ones(n_sequences, dtype=np.int64)

    def seat(self, ids: Ints, group: int, micro: int, slot_K: Ints) -> None:
        """Place sequences of one micro-batch in slots of their group."""
        slots = self.layout.slots
        self.micro_K[ids] = micro
        self.first_K[ids] = group * self.layout.context + slots.first_T[slot_K]
        self.width_K[ids] = slots.width_T[slot_K]

    def done(self) -> Placement:
        """Return the placement."""
        return Placement(self.micro_K, self.first_K, self.width_K)
