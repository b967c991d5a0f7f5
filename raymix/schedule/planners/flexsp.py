"""`flexsp`: teams of several sizes side by side in a micro-batch, chosen by an integer program.

After FlexSP (ASPLOS 2025, arXiv 2412.01523): lengths are put in at most 16 buckets such that
rounding up adds the fewest tokens (dynamic programming); then an integer program chooses which
teams to form and how many sequences of each bucket go to each, and makes the slowest team as fast
as possible. Every rank is in one team. Micro-batches hold sequences of like length; the fewest are
tried first, then a few more. Here each group of the layout solves its own programs, over the widths
that the layout allows, where FlexSP solves one for the cluster.

Legend: K sequences, Q buckets, T slots, N ranks of a group.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import Draft, alike, fewest, over_groups
from raymix.schedule.layout import Floats, Ints, Layout
from raymix.schedule.planners.integer_program import Program

_BUCKETS = 16
# Micro-batches tried beyond the fewest.
_MORE = 2
# Where the search for a better solution ends: part of the objective, and nodes of the tree.
_GAP, _NODES = 0.02, 100


@planner("flexsp")
def flexsp(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the placement of FlexSP's programs, one per group and micro-batch."""
    draft = Draft(length_K.size, layout)
    for group, ids in enumerate(over_groups(length_K, layout, cost)):
        for micro, (part, slot_K) in enumerate(_group(length_K[ids], layout, cost)):
            draft.seat(ids[part], group, micro, slot_K)
    return draft.done()


def _group(length_K: Ints, layout: Layout, cost: CostModel) -> list[tuple[Ints, Ints]]:
    """Return the micro-batches of a group: sequences and their slots."""
    if not length_K.size:
        return []
    best: tuple[float, list[tuple[Ints, Ints]]] = (np.inf, [])
    least = fewest(length_K, layout, cost)
    n = least
    while n <= least + _MORE or not best[1]:
        parts = alike(length_K, n, layout, cost)
        if parts is not None:
            solved = [_micro_batch(length_K[part], layout, cost) for part in parts]
            seconds = sum(second for second, _ in solved)
            if seconds < best[0]:
                slots = [slot_K for _, slot_K in solved]
                best = (seconds, list(zip(parts, slots, strict=True)))
        n += 1
        if n > length_K.size:
            break
    return best[1]


def bucket_ends(length_K: Ints, most: int) -> Ints:
    """Return the upper ends of at most `most` buckets that add the fewest tokens, rising."""
    value, count = np.unique(length_K, return_counts=True)
    size = value.size
    number = np.concatenate([[0], count.cumsum()])
    total = np.concatenate([[0], (value * count).cumsum()])
    added = np.full(size + 1, np.inf)
    added[0] = 0.0
    chosen: list[Ints] = []
    for _ in range(min(most, size)):
        fresh, cut = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int64)
        for end in range(1, size + 1):
            begin = np.arange(end)
            padding = value[end - 1] * (number[end] - number[begin]) - (total[end] - total[begin])
            offer = added[:end] + padding
            cut[end] = offer.argmin()
            fresh[end] = offer[cut[end]]
        chosen.append(cut)
        added = fresh
    ends: list[int] = []
    at = size
    for cut in reversed(chosen):
        ends.append(int(value[at - 1]))
        at = int(cut[at])
    return np.array(ends[::-1], dtype=np.int64)


def _micro_batch(length_K: Ints, layout: Layout, cost: CostModel) -> tuple[float, Ints]:
    """Return the time of a micro-batch and the slots of its sequences."""
    slots = layout.slots
    end_Q = bucket_ends(length_K, _BUCKETS)
    bucket_K = np.searchsorted(end_Q, length_K)
    count_Q = np.bincount(bucket_K, minlength=end_Q.size)
    number_QT = _assign(end_Q, count_Q, layout, cost)
    slot_K = np.full(length_K.size, slots.width_T.size - 1)
    for bucket in range(end_Q.size):
        slot_K[bucket_K == bucket] = np.repeat(np.arange(slots.width_T.size), number_QT[bucket])
    second_T = _team_seconds(length_K, slot_K, layout, cost)
    return float(second_T.max()), slot_K


def _team_seconds(length_K: Ints, slot_K: Ints, layout: Layout, cost: CostModel) -> Floats:
    slots = layout.slots
    width_K = slots.width_T[slot_K]
    size = slots.width_T.size
    attention = np.bincount(slot_K, cost.attention(length_K, width_K), size)
    tokens = np.bincount(slot_K, shards(length_K, width_K), size)
    volume = np.bincount(slot_K, length_K, size)
    gather = np.where((volume > 0) & (slots.width_T > 1), cost.gather(volume, slots.width_T), 0)
    return gather + attention + cost.linear(tokens)


def _assign(end_Q: Ints, count_Q: Ints, layout: Layout, cost: CostModel) -> Ints:
    """Return how many sequences of each bucket go to each slot, shape (Q, T)."""
    slots, n_ranks = layout.slots, layout.context
    n_slots = slots.width_T.size
    program = Program()
    number = program.variables(end_Q.size * n_slots, upper=np.repeat(count_Q, n_slots), whole=True)
    number_QT = number.reshape(end_Q.size, n_slots)
    used_T = program.variables(n_slots, upper=1, whole=True)
    (slowest,) = program.variables(1, cost=1.0)
    for bucket, count in enumerate(count_Q.tolist()):
        program.row(number_QT[bucket], 1.0, low=count, high=count)
    for rank in range(n_ranks):
        program.row(used_T[slots.covers_TN[:, rank] > 0], 1.0, high=1)
    for slot, width in enumerate(slots.width_T.tolist()):
        share_Q, link = shards(end_Q, width), cost.link(width)
        mine = np.append(number_QT[:, slot], used_T[slot])
        program.row(mine, np.append(share_Q, -cost.memory_tokens), high=0)
        per_Q = cost.attention(end_Q, width) + link.token_s * end_Q
        for floor, slope in ((cost.base_s, cost.linear_s), (cost.floor_s, 0.0)):
            once = floor + link.latency_s
            values = np.concatenate([per_Q + slope * share_Q, [once, -1.0]])
            program.row(np.append(mine, slowest), values, high=0)
    found = program.solve(gap=_GAP, nodes=_NODES)
    if found is None:
        # Rounding up to buckets can ask for more room than there is: everything sharded fits.
        whole = np.zeros((end_Q.size, n_slots), dtype=np.int64)
        whole[:, -1] = count_Q
        return whole
    return np.rint(found.value[number_QT]).astype(np.int64)
