"""Shared parts of planners: balancing groups, splitting a group's sequences into micro-batches.

Legend: K sequences, longest first; G groups, N ranks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.cost.timing import Placement
from raymix.schedule.layout import Floats, Ints, Layout


def lpt_bins(work_K: Floats, n_bins: int) -> list[Ints]:
    """Return the items of each bin by LPT: the largest first, each to the least loaded bin."""
    order = np.argsort(-work_K, kind="stable")
    heap = [(0.0, index) for index in range(n_bins)]
    heapify(heap)
    members: list[list[int]] = [[] for _ in range(n_bins)]
    for k, work in zip(order.tolist(), work_K[order].tolist(), strict=True):
        load, index = heap[0]
        members[index].append(k)
        heapreplace(heap, (load + work, index))
    # Rising ids are lengths longest first again, which every function below relies on.
    return [np.sort(np.array(ids, dtype=np.int64)) for ids in members]


def balance_groups(length_K: Ints, layout: Layout, cost: CostModel) -> list[Ints]:
    """Return the sequences of each group, work balanced by LPT.

    Work is that on the fewest ranks which hold a sequence: the width is not chosen yet.
    """
    width_K = cost.min_widths(length_K, layout.widths)
    return lpt_bins(cost.work(length_K, width_K), layout.groups)


def min_micro_batches(length_K: Ints, layout: Layout, cost: CostModel) -> int:
    """Return the fewest micro-batches that hold the sequences of one group, all sharded."""
    # Includes the padding of shards: many short sequences, kept local, can need fewer.
    return max(1, -(-int(shard_tokens(length_K, layout.context).sum()) // cost.memory_tokens))


def split_strided(
    length_K: Ints, n_parts: int, layout: Layout, cost: CostModel
) -> list[Ints] | None:
    """Return `n_parts` micro-batches of short and long sequences, or None if one does not fit.

    Skrull's algorithm 2: every n-th of the sorted sequences.
    """
    parts = [np.arange(length_K.size)[start::n_parts] for start in range(n_parts)]
    tokens_K = shard_tokens(length_K, layout.context)
    fits = all(int(tokens_K[ids].sum()) <= cost.memory_tokens for ids in parts)
    return parts if fits else None


def split_balanced(
    length_K: Ints, n_parts: int, layout: Layout, cost: CostModel
) -> list[Ints] | None:
    """Return `n_parts` micro-batches of nearly equal work, or None if the greedy method fails.

    LPT with a memory limit: each sequence goes to the least loaded micro-batch that has capacity.
    """
    tokens_K = shard_tokens(length_K, layout.context).tolist()
    work_K = cost.work(length_K).tolist()
    heap, free = [(0.0, index) for index in range(n_parts)], [cost.memory_tokens] * n_parts
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    for k, (tokens, work) in enumerate(zip(tokens_K, work_K, strict=True)):
        # Popped parts return to the heap: a later, shorter sequence may still fit in them.
        skipped = []
        while heap and free[heap[0][1]] < tokens:
            skipped.append(heappop(heap))
        if not heap:
            return None
        load, index = heap[0]
        heapreplace(heap, (load + work, index))
        parts[index].append(k)
        free[index] -= tokens
        for entry in skipped:
            heappush(heap, entry)
    return [np.array(ids, dtype=np.int64) for ids in parts]


def split_by_length(
    length_K: Ints, n_parts: int, layout: Layout, cost: CostModel
) -> list[Ints] | None:
    """Return `n_parts` micro-batches of similar lengths and nearly equal work, or None.

    As in FlexSP: ranks with sequences of similar length are balanced with nothing sharded.
    """
    tokens_K = shard_tokens(length_K, layout.context).tolist()
    work_K = cost.work(length_K)
    # The part in which a sequence's midpoint lies on the axis of cumulative work.
    target_K = ((work_K.cumsum() - work_K / 2) * n_parts / work_K.sum()).tolist()
    parts: list[list[int]] = []
    # Starts full, so that the first sequence opens a part.
    part_tokens = cost.memory_tokens
    for k, tokens in enumerate(tokens_K):
        part_tokens += tokens
        # A part also ends where the memory of its ranks does.
        if part_tokens > cost.memory_tokens or target_K[k] >= len(parts):
            parts.append([])
            part_tokens = tokens
        parts[-1].append(k)
    return [np.array(ids, dtype=np.int64) for ids in parts] if len(parts) <= n_parts else None


SplitFunction = Callable[[Ints, int, Layout, CostModel], list[Ints] | None]


def smallest_split(
    length_K: Ints, layout: Layout, cost: CostModel, splits: Sequence[SplitFunction]
) -> list[Ints]:
    """Return the fewest micro-batches that any of the split functions finds."""
    n_parts = min_micro_batches(length_K, layout, cost)
    # Ends: one sequence per micro-batch always fits, by `validate_lengths`.
    while True:
        for split in splits:
            if (parts := split(length_K, n_parts, layout, cost)) is not None:
                return parts
        n_parts += 1


class PlacementBuilder:
    """A placement filled micro-batch by micro-batch; sequences by index, longest first."""

    def __init__(self, n_sequences: int, layout: Layout) -> None:
        """Start with no sequence placed (micro-step -1)."""
        self.layout = layout
        self.micro_K = np.full(n_sequences, -1, dtype=np.int64)
        self.first_K = np.zeros(n_sequences, dtype=np.int64)
        self.width_K = np.ones(n_sequences, dtype=np.int64)

    def place(self, ids: Ints, group: int, micro: int, slot_K: Ints) -> None:
        """Place sequences of one micro-batch in slots of their group."""
        slots = self.layout.slots
        self.micro_K[ids] = micro
        self.first_K[ids] = group * self.layout.context + slots.first_T[slot_K]
        self.width_K[ids] = slots.width_T[slot_K]

    def build(self) -> Placement:
        """Return the placement."""
        return Placement(self.micro_K, self.first_K, self.width_K)
