"""Exchanges of sequences between micro-batches: of slow and fast groups, and within slow groups.

An exchange moves one sequence to the target micro-batch and takes back one or none. Some are chosen
by their work, some at random; all are assigned, improved and timed at once, and the best applied.

Legend: K sequences of the batch, G groups; X sequences of the source partition, Y of the target
(and none, once per micro-batch), P and Q their micro-batches, C feasible pairs of X and Y; S as in
`assignment`.
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
    """Two micro-batches, of two partitions or of one, after an exchange."""

    source: int
    """Index of the group that gives a sequence."""
    target: int
    source_micro: int
    """Index of the micro-batch in its partition."""
    target_micro: int
    parts: list[Ints]
    """Sequences of the source and of the target micro-batch afterwards."""
    slots: list[Ints]
    """Their slots before, (1, K) each; -1 for the sequence just added."""


def exchange_between_groups(
    search: PartitionSearch, partitions: list[Partition], seed: int
) -> None:
    """Apply improving exchanges between the slowest groups and the fastest.

    Args:
        search: The search of the batch.
        partitions: The partition of each group, changed in place.
        seed: Seed of the random exchanges.
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
        exchanges += _candidates(search, partitions, (slow, fast), goals, seed)
    for exchange, improved in zip(exchanges, _improved(search, exchanges), strict=True):
        source, target = partitions[exchange.source], partitions[exchange.target]
        new_source = _replaced(source, {exchange.source_micro: 0}, improved)
        new_target = _replaced(target, {exchange.target_micro: 1}, improved)
        # An earlier exchange of the list may have changed the source, and with it the indices
        # and sequences that this exchange assumes.
        unchanged = source.seconds == second_G[exchange.source]
        before_s = max(source.seconds, target.seconds)
        if unchanged and max(new_source.seconds, new_target.seconds) < before_s * (1 - _MIN_GAIN):
            partitions[exchange.source], partitions[exchange.target] = new_source, new_target


def exchange_within_groups(search: PartitionSearch, partitions: list[Partition], seed: int) -> None:
    """Apply the best exchange between micro-batches of each of the slowest groups."""
    second_G = np.array([partition.seconds for partition in partitions])
    slow = np.flatnonzero(second_G >= second_G.max() * (1 - _SLOWEST)).tolist()
    exchanges = [
        exchange
        for group in slow
        for exchange in _candidates(search, partitions, (group, group), [], seed)
    ]
    best: dict[int, Partition] = {}
    for exchange, improved in zip(exchanges, _improved(search, exchanges), strict=True):
        group = exchange.source
        replacements = {exchange.source_micro: 0, exchange.target_micro: 1}
        partition = _replaced(partitions[group], replacements, improved)
        current = best.get(group, partitions[group])
        if partition.seconds < current.seconds * (1 - _MIN_GAIN):
            best[group] = partition
    for group, partition in best.items():
        partitions[group] = partition


def _candidates(
    search: PartitionSearch,
    partitions: list[Partition],
    pair: tuple[int, int],
    goals: Sequence[float],
    seed: int,
) -> list[_Exchange]:
    """Return exchanges that fit in memory: the nearest to each goal, and some random ones.

    Args:
        search: The search of the batch.
        partitions: The partition of each group.
        pair: Source and target group.
        goals: Rank-seconds of work to move.
        seed: Seed of the random exchanges.
    """
    source, target = (partitions[group] for group in pair)
    p_X, k_X = _flatten(source.parts)
    q_Y, k_Y = _flatten(target.parts)
    # Y ends with "no sequence back" from each target micro-batch and from a new one.
    q_Y = np.concatenate([q_Y, np.arange(len(target.parts) + 1)])
    work_XY, fits_XY = _work_and_fit(search, (p_X, k_X), (q_Y, k_Y), len(target.parts) + 1)
    if pair[0] == pair[1]:
        fits_XY &= p_X[:, None] != q_Y
    feasible_C = np.flatnonzero(fits_XY)
    if not feasible_C.size:
        return []
    work_C = work_XY.ravel()[feasible_C]
    selected = [int(np.abs(work_C - goal).argmin()) for goal in goals]
    if n_random := min(search.budget.random_exchanges, feasible_C.size):
        rng = np.random.default_rng(seed)
        selected += rng.choice(feasible_C.size, n_random, replace=False).tolist()
    exchanges = []
    # dict.fromkeys: two goals may select one exchange, which is improved once.
    for index in dict.fromkeys(selected):
        x, y = divmod(int(feasible_C[index]), q_Y.size)
        p, q = int(p_X[x]), int(q_Y[y])
        given, returned = k_X[x : x + 1], k_Y[y : y + 1]
        is_new = q == len(target.parts)
        old_part = _NO_SEQUENCES if is_new else target.parts[q]
        old_slots = _NO_SEQUENCES[None] if is_new else target.slots[q]
        source_part, source_slots = _after(source.parts[p], source.slots[p], given, returned)
        target_part, target_slots = _after(old_part, old_slots, returned, given)
        parts, slots = [source_part, target_part], [source_slots, target_slots]
        exchanges.append(_Exchange(*pair, p, q, parts, slots))
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


def _after(part: Ints, slot_SK: Ints, removed: Ints, added: Ints) -> tuple[Ints, Ints]:
    """Return a micro-batch and its slots after removing and adding one sequence each, or none."""
    remains = part != removed[0] if removed.size else np.ones(part.size, dtype=np.bool_)
    ids = np.append(part[remains], added)
    slots = np.append(slot_SK[0, remains], np.full(added.size, -1))
    # Rising ids are lengths longest first, as `assignment` expects.
    order = np.argsort(ids)
    return ids[order], slots[None, order]


def _flatten(parts: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the micro-batch index and the id of every sequence of a partition."""
    sizes = [part.size for part in parts]
    return np.repeat(np.arange(len(parts)), sizes), np.concatenate([*parts, _NO_SEQUENCES])


def _improved(search: PartitionSearch, exchanges: Sequence[_Exchange]) -> list[Partition]:
    """Return the two micro-batches of each exchange, assigned and improved."""
    pairs = [
        Partition(index, exchange.parts, exchange.slots, _UNKNOWN_S)
        for index, exchange in enumerate(exchanges)
    ]
    return search.improve_exchanged(pairs)


_UNKNOWN_S = np.full(1, np.inf)
_NO_SEQUENCES = np.zeros(0, dtype=np.int64)


def _replaced(partition: Partition, replacements: dict[int, int], pair: Partition) -> Partition:
    """Return a partition with some micro-batches replaced; empty ones are dropped.

    Args:
        partition: The old partition.
        replacements: Index in `pair` by index in `partition`; its length stands for a new one.
        pair: The two micro-batches after an exchange.
    """
    rows: list[tuple[Ints, Ints, float]] = []
    old_rows = list(zip(partition.parts, partition.slots, partition.second_M.tolist(), strict=True))
    # One index past the end: the exchange may have opened a new micro-batch.
    for index in range(len(old_rows) + 1):
        new = replacements.get(index)
        if new is None:
            rows += old_rows[index : index + 1]
        elif pair.parts[new].size:
            rows.append((pair.parts[new], pair.slots[new], float(pair.second_M[new])))
    second_M: Floats = np.array([row[2] for row in rows])
    return Partition(partition.group, [row[0] for row in rows], [row[1] for row in rows], second_M)
