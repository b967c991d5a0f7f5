"""`flexsp`: CP groups of several sizes side by side in a micro-batch, by integer programs.

After FlexSP (ASPLOS 2025, arXiv 2412.01523): lengths are rounded up to at most 16 bucket ends that
add the fewest tokens (dynamic programming); an integer program then chooses the CP groups and the
number of sequences of each bucket on each of them, and minimizes the time of the slowest. Every
rank is in at most one CP group. Micro-batches hold sequences of similar length; the fewest are
tried first, then a few more. Here each group of the layout solves its own programs over the widths
that the layout allows, where FlexSP solves one for the cluster.

Legend: K sequences, Q buckets, T slots, N ranks of a group.
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
    split_by_length,
)
from raymix.schedule.layout import Floats, Ints, Layout
from raymix.schedule.planners.integer_program import IntegerProgram

_MAX_BUCKETS = 16
# Micro-batches tried beyond the fewest that hold the sequences.
_EXTRA_MICRO_BATCHES = 2
# A solution within 2 % of the bound is below the error of the cost model; nodes limit the search.
_RELATIVE_GAP, _MAX_NODES = 0.02, 100


@planner("flexsp")
def flexsp(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the placement of FlexSP's programs, one per group and micro-batch."""
    builder = PlacementBuilder(length_K.size, layout)
    for group, ids in enumerate(balance_groups(length_K, layout, cost)):
        for micro, (part, slot_K) in enumerate(_plan_group(length_K[ids], layout, cost)):
            builder.place(ids[part], group, micro, slot_K)
    return builder.build()


def _plan_group(length_K: Ints, layout: Layout, cost: CostModel) -> list[tuple[Ints, Ints]]:
    """Return the micro-batches of a group: sequences and their slots."""
    if not length_K.size:
        return []
    best: tuple[float, list[tuple[Ints, Ints]]] = (np.inf, [])
    min_parts = min_micro_batches(length_K, layout, cost)
    n_parts = min_parts
    # The greedy split can fail at the fewest parts; then more are tried until one succeeds.
    while n_parts <= min_parts + _EXTRA_MICRO_BATCHES or not best[1]:
        parts = split_by_length(length_K, n_parts, layout, cost)
        if parts is not None:
            solved = [_solve_micro_batch(length_K[part], layout, cost) for part in parts]
            seconds = sum(second for second, _ in solved)
            if seconds < best[0]:
                slots = [slot_K for _, slot_K in solved]
                best = (seconds, list(zip(parts, slots, strict=True)))
        n_parts += 1
        if n_parts > length_K.size:
            break
    return best[1]


def bucket_ends(length_K: Ints, max_buckets: int) -> Ints:
    """Return the upper ends of at most `max_buckets` buckets that add the fewest tokens, rising."""
    value, count = np.unique(length_K, return_counts=True)
    n_values = value.size
    # Prefix sums: the padding of a bucket is a difference of two, so a step costs one row.
    n_below = np.concatenate([[0], count.cumsum()])
    tokens_below = np.concatenate([[0], (value * count).cumsum()])
    # Fewest added tokens of the first `end` values in b buckets, b = 0, 1, ...
    padding = np.full(n_values + 1, np.inf)
    padding[0] = 0.0
    begins_by_step: list[Ints] = []
    for _ in range(min(max_buckets, n_values)):
        next_padding = np.full(n_values + 1, np.inf)
        begin_of = np.zeros(n_values + 1, dtype=np.int64)
        for end in range(1, n_values + 1):
            begin = np.arange(end)
            last_bucket = value[end - 1] * (n_below[end] - n_below[begin])
            last_bucket = last_bucket - (tokens_below[end] - tokens_below[begin])
            total = padding[:end] + last_bucket
            begin_of[end] = total.argmin()
            next_padding[end] = total[begin_of[end]]
        begins_by_step.append(begin_of)
        padding = next_padding
    ends: list[int] = []
    end = n_values
    for begin_of in reversed(begins_by_step):
        ends.append(int(value[end - 1]))
        end = int(begin_of[end])
    return np.array(ends[::-1], dtype=np.int64)


def _solve_micro_batch(length_K: Ints, layout: Layout, cost: CostModel) -> tuple[float, Ints]:
    """Return the time of a micro-batch and the slots of its sequences."""
    slots = layout.slots
    end_Q = bucket_ends(length_K, _MAX_BUCKETS)
    bucket_K = np.searchsorted(end_Q, length_K)
    count_Q = np.bincount(bucket_K, minlength=end_Q.size)
    count_QT = _solve_counts(end_Q, count_Q, layout, cost)
    slot_K = np.full(length_K.size, slots.width_T.size - 1)
    for bucket in range(end_Q.size):
        slot_K[bucket_K == bucket] = np.repeat(np.arange(slots.width_T.size), count_QT[bucket])
    # With the true lengths: the program saw them rounded up.
    second_T = _slot_seconds(length_K, slot_K, layout, cost)
    return float(second_T.max()), slot_K


def _slot_seconds(length_K: Ints, slot_K: Ints, layout: Layout, cost: CostModel) -> Floats:
    """Return the time of each slot of a micro-batch, shape (T,)."""
    slots = layout.slots
    width_K = slots.width_T[slot_K]
    n_slots = slots.width_T.size
    attention = np.bincount(slot_K, cost.attention(length_K, width_K), n_slots)
    tokens = np.bincount(slot_K, shard_tokens(length_K, width_K), n_slots)
    volume = np.bincount(slot_K, length_K, n_slots)
    gather = np.where((volume > 0) & (slots.width_T > 1), cost.gather(volume, slots.width_T), 0)
    # Communication is added, as in the program; eq. (1) overlaps it with local attention, which a
    # slot of several ranks does not have.
    return gather + attention + cost.linear(tokens)


def _solve_counts(end_Q: Ints, count_Q: Ints, layout: Layout, cost: CostModel) -> Ints:
    """Return the number of sequences of each bucket on each slot, shape (Q, T)."""
    slots, n_ranks = layout.slots, layout.context
    n_slots = slots.width_T.size
    program = IntegerProgram()
    upper = np.repeat(count_Q, n_slots)
    counts = program.add_variables(end_Q.size * n_slots, upper=upper, integer=True)
    count_QT = counts.reshape(end_Q.size, n_slots)
    used_T = program.add_variables(n_slots, upper=1, integer=True)
    (slowest,) = program.add_variables(1, cost=1.0)
    for bucket, count in enumerate(count_Q.tolist()):
        program.add_constraint(count_QT[bucket], 1.0, low=count, high=count)
    # A rank is in at most one CP group of the micro-batch.
    for rank in range(n_ranks):
        program.add_constraint(used_T[slots.covers_TN[:, rank] > 0], 1.0, high=1)
    for slot, width in enumerate(slots.width_T.tolist()):
        tokens_Q, link = shard_tokens(end_Q, width), cost.link(width)
        variables = np.append(count_QT[:, slot], used_T[slot])
        # Memory, and no sequence on a slot that is not used: the capacity is memory times used.
        program.add_constraint(variables, np.append(tokens_Q, -cost.memory_tokens), high=0)
        second_Q = cost.attention(end_Q, width) + link.token_s * end_Q
        # The linear layers take the larger of two lines: a constraint for each.
        for fixed, slope in ((cost.base_s, cost.linear_s), (cost.floor_s, 0.0)):
            row = np.concatenate([second_Q + slope * tokens_Q, [fixed + link.latency_s, -1.0]])
            program.add_constraint(np.append(variables, slowest), row, high=0)
    solution = program.solve(gap=_RELATIVE_GAP, max_nodes=_MAX_NODES)
    if solution is None:
        # Lengths rounded up to bucket ends can exceed the memory; everything sharded fits.
        all_sharded = np.zeros((end_Q.size, n_slots), dtype=np.int64)
        all_sharded[:, -1] = count_Q
        return all_sharded
    # The solver returns floats within 1e-6 of integers.
    return np.rint(solution.value[count_QT]).astype(np.int64)
