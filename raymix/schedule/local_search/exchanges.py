"""Exchanges of sequences between the micro-batches of slow and fast groups.

An exchange moves one sequence to the target micro-batch and takes back one or none. Candidates are
chosen by their work; all are assigned and timed at once, and those that gain are applied.

Legend: K sequences of the batch, G groups; X sequences of the source partition, Y of the target
(and none, once per micro-batch), P and Q their micro-batches, C feasible pairs of X and Y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost.model import shard_tokens
from raymix.schedule.layout import Floats, Ints
from raymix.schedule.local_search.partitions import Partition, PartitionSearch

# Exchanges that gain less than this fraction of the time are not applied.
_MIN_GAIN = 2e-4
# Groups whose times differ by less than the first fraction count as balanced; those within the
# second of the slowest count as slowest too.
_BALANCED, _SLOWEST = 0.002, 0.01
# Work to move, as fractions of the gap between two groups: half of it makes them equal.
_GAP_FRACTIONS = (0.5, 0.25, 0.125)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Two micro-batches of two groups after an exchange."""

    source: int
    """Index of the group that gives a sequence."""
    target: int
    source_micro: int
    """Index of the micro-batch in its partition."""
    target_micro: int
    parts: list[Ints]
    """Sequences of the source and of the target micro-batch afterwards."""


def exchange_between_groups(search: PartitionSearch, partitions: list[Partition]) -> None:
    """Apply improving exchanges between the slowest groups and the fastest, in place.

    Args:
        search: The search of the batch.
        partitions: The partition of each group.
    """
    second_G = np.array([partition.seconds for partition in partitions])
    order = np.argsort(-second_G, kind="stable").tolist()
    slowest_s = float(second_G.max())
    exchanges: list[_Exchange] = []
    # The slowest with the fastest, the second slowest with the second fastest, and so on.
    for slow, fast in zip(order, order[::-1], strict=True):
        gap = float(second_G[slow] - second_G[fast])
        if gap <= _BALANCED * slowest_s or second_G[slow] < slowest_s * (1 - _SLOWEST):
            break
        # Times are of ranks and work is in rank-seconds.
        goals = [gap * fraction * search.layout.context for fraction in _GAP_FRACTIONS]
        exchanges += _candidates(search, partitions, (slow, fast), goals)
    pairs = [
        Partition(index, exchange.parts, [], _UNKNOWN_S) for index, exchange in enumerate(exchanges)
    ]
    assigned = search.assign(pairs, after_exchange=True)
    for exchange, pair in zip(exchanges, assigned, strict=True):
        source, target = partitions[exchange.source], partitions[exchange.target]
        new_source = _replaced(source, exchange.source_micro, pair, 0)
        new_target = _replaced(target, exchange.target_micro, pair, 1)
        # An earlier exchange of the list may have changed the source, and with it the indices
        # and sequences that this exchange assumes.
        unchanged = source.seconds == second_G[exchange.source]
        before_s = max(source.seconds, target.seconds)
        if unchanged and max(new_source.seconds, new_target.seconds) < before_s * (1 - _MIN_GAIN):
            partitions[exchange.source], partitions[exchange.target] = new_source, new_target


def _candidates(
    search: PartitionSearch,
    partitions: list[Partition],
    pair: tuple[int, int],
    goals: Sequence[float],
) -> list[_Exchange]:
    """Return exchanges that fit in memory, the nearest to each goal.

    Args:
        search: The search of the batch.
        partitions: The partition of each group.
        pair: Source and target group.
        goals: Rank-seconds of work to move.
    """
    source, target = (partitions[group] for group in pair)
    p_X, k_X = _flatten(source.parts)
    q_Y, k_Y = _flatten(target.parts)
    # Y ends with "no sequence back" from each target micro-batch and from a new one.
    q_Y = np.concatenate([q_Y, np.arange(len(target.parts) + 1)])
    work_XY, fits_XY = _work_and_fit(search, (p_X, k_X), (q_Y, k_Y), len(target.parts) + 1)
    feasible_C = np.flatnonzero(fits_XY)
    if not feasible_C.size:
        return []
    work_C = work_XY.ravel()[feasible_C]
    selected = [int(np.abs(work_C - goal).argmin()) for goal in goals]
    exchanges = []
    # dict.fromkeys: two goals may select one exchange, which is assigned once.
    for index in dict.fromkeys(selected):
        x, y = divmod(int(feasible_C[index]), q_Y.size)
        p, q = int(p_X[x]), int(q_Y[y])
        given, returned = k_X[x : x + 1], k_Y[y : y + 1]
        is_new = q == len(target.parts)
        old_part = _NO_SEQUENCES if is_new else target.parts[q]
        parts = [_after(source.parts[p], given, returned), _after(old_part, returned, given)]
        exchanges.append(_Exchange(*pair, p, q, parts))
    return exchanges


def _work_and_fit(
    search: PartitionSearch, source: tuple[Ints, Ints], target: tuple[Ints, Ints], n_target: int
) -> tuple[Floats, np.ndarray]:
    """Return the work each exchange moves, in rank-seconds, and whether it fits, both (X, Y)."""
    (p_X, k_X), (q_Y, k_Y) = source, target
    cost, layout = search.cost, search.layout
    length = search.length_K[np.concatenate([k_X, k_Y])]
    # Sharded tokens: a micro-batch fits if it does with everything sharded.
    tokens = shard_tokens(length, layout.context)
    work = cost.work(length, cost.min_widths(length, layout.widths))
    none = np.zeros(n_target, dtype=np.int64)
    tokens_X, tokens_Y = tokens[: k_X.size], np.concatenate([tokens[k_X.size :], none])
    work_X, work_Y = work[: k_X.size], np.concatenate([work[k_X.size :], none])
    tokens_P = np.bincount(p_X, tokens_X)
    tokens_Q = np.bincount(q_Y, tokens_Y, n_target)
    added_XY = tokens_X[:, None] - tokens_Y
    fits_XY = tokens_Q[q_Y] + added_XY <= cost.memory_tokens
    fits_XY &= tokens_P[p_X][:, None] - added_XY <= cost.memory_tokens
    return work_X[:, None] - work_Y, fits_XY


def _after(part: Ints, removed: Ints, added: Ints) -> Ints:
    """Return a micro-batch after removing and adding one sequence each, or none."""
    # Rising ids are lengths longest first, as `assignment` expects.
    return np.sort(np.append(np.setdiff1d(part, removed), added))


def _flatten(parts: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the micro-batch index and the id of every sequence of a partition."""
    sizes = [part.size for part in parts]
    return np.repeat(np.arange(len(parts)), sizes), np.concatenate([*parts, _NO_SEQUENCES])


_UNKNOWN_S = np.full(1, np.inf)
_NO_SEQUENCES = np.zeros(0, dtype=np.int64)


def _replaced(partition: Partition, micro: int, pair: Partition, index: int) -> Partition:
    """Return a partition with one micro-batch replaced, or added if `micro` is past the end.

    Args:
        partition: The old partition.
        micro: Index of the micro-batch in it.
        pair: The two micro-batches after an exchange.
        index: Which of the two it becomes; an empty one is dropped.
    """
    part = [pair.parts[index]] if pair.parts[index].size else []
    # Slices: past the end they add, and an empty micro-batch leaves nothing.
    parts, slots, second_M = list(partition.parts), list(partition.slots), partition.second_M
    parts[micro : micro + 1] = part
    slots[micro : micro + 1] = [pair.slots[index]] if part else []
    added = pair.second_M[index : index + 1] if part else np.zeros(0)
    second_M = np.concatenate([second_M[:micro], added, second_M[micro + 1 :]])
    return Partition(partition.group, parts, slots, second_M)
