"""Best-improvement moves in many micro-batches at once, until none shortens its slowest rank.

A move takes a sequence from the slowest rank to another slot. Where no move helps, it is swapped
with a sequence of other ranks. Only sequences on the slowest rank can shorten a micro-batch, so
only these are tried.

Legend as in `assignment`; X candidates on the slowest rank, Y candidates to swap them with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raymix.schedule.layout import Floats, Ints
from raymix.schedule.local_search.assignment import CostTables, Loads

Bools = NDArray[np.bool_]
# Local, sharded, gather and tokens: see `Loads`.
_Terms = tuple[Floats, Floats, Floats, Floats]

# A move must shorten the micro-batch by this fraction, or rounding errors could make moves cycle.
_MIN_GAIN = 1e-6


class MoveLimits(Protocol):
    """Limits of `improve`; `SearchBudget` has them."""

    # A protocol, as `partitions`, which defines the budget, imports this module.

    @property
    def balance_tolerance(self) -> float:
        """Fraction of the time below which the mean wait of ranks is not worth a swap."""
        ...

    @property
    def move_candidates(self) -> int:
        """Sequences of the slowest rank that are tried."""
        ...

    @property
    def swap_candidates(self) -> int:
        """Sequences of other ranks that are tried as partners."""
        ...


def improve(tables: CostTables, slot_BK: Ints, max_moves: int, limits: MoveLimits) -> Ints:
    """Return assignments at least as fast as those given, shape (B, K).

    Args:
        tables: Costs of the micro-batches.
        slot_BK: Slots of the sequences, -1 for padding; must fit in memory.
        max_moves: Moves and swaps per micro-batch.
        limits: Numbers of candidates, and the tolerance of swaps.
    """
    slot_BK = slot_BK.copy()
    # Rows that still change; the others are dropped, so late rounds cost little.
    active = np.arange(slot_BK.shape[0])
    active_tables, active_slot_BK = tables, slot_BK.copy()
    for _ in range(max_moves):
        loads = Loads.of(active_tables, active_slot_BK)
        second_BN = loads.seconds(active_tables.cost)
        moved = _apply_best_move(
            active_tables, active_slot_BK, loads, second_BN, limits.move_candidates
        )
        # Swaps cost X times Y evaluations, moves X times T: only where balance is still poor.
        unbalanced = second_BN.mean(axis=1) < second_BN.max(axis=1) * (1 - limits.balance_tolerance)
        stuck = np.flatnonzero(~moved & unbalanced)
        if stuck.size:
            # Indexing with an array copies: the swapped rows must be written back.
            stuck_slot_BK = active_slot_BK[stuck]
            moved[stuck] = _apply_best_swap(
                active_tables.rows(stuck), stuck_slot_BK, loads.rows(stuck), limits
            )
            active_slot_BK[stuck] = stuck_slot_BK
        if not moved.all():
            slot_BK[active] = active_slot_BK
            active = active[moved]
            active_tables, active_slot_BK = tables.rows(active), slot_BK[active]
        if not active.size:
            return slot_BK
    slot_BK[active] = active_slot_BK
    return slot_BK


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Selected sequences of each micro-batch with their costs, padded to X per row."""

    k_BX: Ints
    is_real_BX: Bools
    """False for padding, whose other columns are those of arbitrary sequences."""
    length_BX: Ints
    slot_BX: Ints
    level_BX: Ints
    attention_BXW: Floats
    tokens_BXW: Ints
    covers_BXN: Floats

    @classmethod
    def of(
        cls, tables: CostTables, slot_BK: Ints, eligible_BK: Bools, max_count: int
    ) -> _Candidates:
        """Return at most `max_count` of the eligible sequences, evenly from long to short."""
        n_eligible_B = eligible_BK.sum(axis=1, keepdims=True)
        n_selected_B = np.minimum(n_eligible_B, max_count)
        turn_BK = eligible_BK.cumsum(axis=1)
        divisor_B = np.maximum(n_eligible_B, 1)
        # The i-th of n is selected where i * n_selected / n passes a whole number.
        passed_BK = turn_BK * n_selected_B // divisor_B
        selected_BK = eligible_BK & (passed_BK > (turn_BK - 1) * n_selected_B // divisor_B)
        n_columns = int(n_selected_B.max(initial=0))
        # A stable sort by a boolean moves the selected to the front, in order of length.
        k_BX = np.argsort(~selected_BK, axis=1, kind="stable")[:, :n_columns]
        row = np.arange(k_BX.shape[0])[:, None]
        # A sequence without a slot (-1) needs an index that exists, and does not use the columns.
        slot_BX = np.maximum(slot_BK[row, k_BX], 0)
        return cls(
            k_BX,
            selected_BK[row, k_BX],
            tables.length_BK[row, k_BX],
            slot_BX,
            tables.slots.level_T[slot_BX],
            tables.attention_BKW[row, k_BX],
            tables.shard_tokens_BKW[row, k_BX],
            tables.slots.covers_TN[slot_BX],
        )


def _on_slowest(tables: CostTables, slot_BK: Ints, second_BN: Floats) -> Bools:
    """Return whether each sequence is on the slowest rank of its micro-batch, shape (B, K)."""
    # A last slot that covers no rank: index -1, of padding, refers to it.
    covers_TN = np.vstack([tables.slots.covers_TN > 0, np.zeros(second_BN.shape[1], np.bool_)])
    return covers_TN[slot_BK, second_BN.argmax(axis=1)[:, None]]


def _apply_best_move(
    tables: CostTables, slot_BK: Ints, loads: Loads, second_BN: Floats, max_candidates: int
) -> Bools:
    """Apply the best move in each micro-batch in place; return where one improves, shape (B,)."""
    on_slowest_BK = _on_slowest(tables, slot_BK, second_BN)
    candidates = _Candidates.of(tables, slot_BK, on_slowest_BK, max_candidates)
    own_BXT = candidates.slot_BX[:, :, None] == np.arange(tables.slots.width_T.size)
    count_BXT = loads.count_BT[:, None, :] - own_BXT
    second_BXT = _seconds_after_move(
        tables, _loads_without(tables, loads, candidates), count_BXT, candidates
    )
    second_BXT[~candidates.is_real_BX] = np.inf
    rows = np.arange(slot_BK.shape[0])
    flat = second_BXT.reshape(rows.size, -1)
    best_B = flat.argmin(axis=1)
    moved = flat[rows, best_B] < second_BN.max(axis=1) * (1 - _MIN_GAIN)
    x_B, slot_B = np.divmod(best_B, second_BXT.shape[2])
    slot_BK[rows[moved], candidates.k_BX[rows, x_B][moved]] = slot_B[moved]
    return moved


def insert_unassigned(tables: CostTables, slot_BK: Ints) -> Ints:
    """Return assignments with the unassigned sequence of each micro-batch in its best slot.

    At most one per micro-batch; it keeps -1 where no slot has capacity.
    """
    slot_BK = slot_BK.copy()
    candidates = _Candidates.of(tables, slot_BK, (slot_BK < 0) & (tables.length_BK > 0), 1)
    if not candidates.k_BX.size:
        return slot_BK
    loads = Loads.of(tables, slot_BK)
    remaining = (
        loads.local_BN[:, None],
        loads.sharded_BN[:, None],
        loads.gather_BN[:, None],
        loads.tokens_BN[:, None],
    )
    second_BT = _seconds_after_move(tables, remaining, loads.count_BT[:, None, :], candidates)[:, 0]
    best_B = second_BT.argmin(axis=1)
    rows = np.arange(best_B.size)
    inserted = np.flatnonzero(candidates.is_real_BX[:, 0] & (second_BT[rows, best_B] < np.inf))
    slot_BK[inserted, candidates.k_BX[inserted, 0]] = best_B[inserted]
    return slot_BK


def _seconds_after_move(
    tables: CostTables, remaining: _Terms, count_BXT: Ints, candidates: _Candidates
) -> Floats:
    """Return the time of the micro-batch with a candidate in each slot, (B, X, T).

    inf where the slot has no capacity.

    Args:
        tables: Costs of the micro-batches.
        remaining: Loads of the ranks without the candidate.
        count_BXT: Other sequences in each slot.
        candidates: The sequences.
    """
    cost, capacity = tables.cost, tables.cost.memory_tokens
    n_ranks = tables.slots.covers_TN.shape[1]
    local, sharded, gather, tokens = remaining
    busy = np.maximum(gather, local)
    remaining_s = busy + sharded + cost.linear(tokens)
    # Local: only one rank's time changes, so all N slots are evaluated at once.
    new_tokens = tokens + candidates.tokens_BXW[:, :, :1]
    own_s = np.maximum(gather, local + candidates.attention_BXW[:, :, :1])
    own_s = own_s + sharded + cost.linear(new_tokens)
    local_s = np.maximum(own_s, _max_of_others(remaining_s))
    by_slot = [np.where(new_tokens > capacity, np.inf, local_s)]
    for slot in range(n_ranks, tables.slots.width_T.size):
        level, covers = int(tables.slots.level_T[slot]), tables.slots.covers_TN[slot]
        new_tokens = tokens + covers * candidates.tokens_BXW[:, :, level, None]
        added_gather = tables.token_W[level] * candidates.length_BX
        # The first sequence of a slot pays the latency of the collective.
        added_gather = added_gather + tables.latency_W[level] * (count_BXT[:, :, slot] == 0)
        busy = np.maximum(gather + covers * added_gather[:, :, None], local)
        added_attention = covers * candidates.attention_BXW[:, :, level, None]
        seconds = (busy + sharded + added_attention + cost.linear(new_tokens)).max(axis=2)
        overfull = (new_tokens > capacity).any(axis=2)
        by_slot.append(np.where(overfull, np.inf, seconds)[:, :, None])
    return np.concatenate(by_slot, axis=2)


def _loads_without(tables: CostTables, loads: Loads, candidates: _Candidates) -> _Terms:
    """Return local, sharded, gather and tokens of the ranks without each candidate, (B, X, N)."""
    row, column = np.ogrid[: candidates.k_BX.shape[0], : candidates.k_BX.shape[1]]
    level = candidates.level_BX[:, :, None]
    attention = candidates.attention_BXW[row, column, candidates.level_BX][:, :, None]
    tokens = candidates.tokens_BXW[row, column, candidates.level_BX][:, :, None]
    # The last sequence of a slot takes the latency of its collective along.
    is_last = loads.count_BT[row, candidates.slot_BX] == 1
    gather = tables.token_W[candidates.level_BX] * candidates.length_BX
    gather = (gather + tables.latency_W[candidates.level_BX] * is_last)[:, :, None]
    covers = candidates.covers_BXN
    return (
        loads.local_BN[:, None] - covers * np.where(level == 0, attention, 0),
        loads.sharded_BN[:, None] - covers * np.where(level > 0, attention, 0),
        loads.gather_BN[:, None] - covers * gather,
        loads.tokens_BN[:, None] - covers * tokens,
    )


def _max_of_others(second_BXN: Floats) -> Floats:
    """Return the maximum over the other ranks, per rank, shape (B, X, N)."""
    if second_BXN.shape[2] == 1:
        return np.zeros_like(second_BXN)
    # The largest two suffice: the second for the rank with the largest, else the largest.
    top = np.partition(second_BXN, -2, axis=2)[:, :, -2:]
    return np.where(second_BXN == top[:, :, 1:], top[:, :, :1], top[:, :, 1:])


def _apply_best_swap(tables: CostTables, slot_BK: Ints, loads: Loads, limits: MoveLimits) -> Bools:
    """Apply the best swap in each micro-batch in place; return where one improves, shape (B,)."""
    second_BN = loads.seconds(tables.cost)
    on_slowest_BK = _on_slowest(tables, slot_BK, second_BN)
    elsewhere_BK = ~on_slowest_BK & (slot_BK >= 0)
    slowest = _Candidates.of(tables, slot_BK, on_slowest_BK, limits.move_candidates)
    others = _Candidates.of(tables, slot_BK, elsewhere_BK, limits.swap_candidates)
    second_BXY = _seconds_after_swap(tables, loads, slowest, others)
    second_BXY[~(slowest.is_real_BX[:, :, None] & others.is_real_BX[:, None, :])] = np.inf
    rows = np.arange(slot_BK.shape[0])
    # argmin refuses an empty axis: with everything on the slowest rank, nothing can be swapped.
    if not second_BXY.size:
        return np.zeros(rows.size, dtype=np.bool_)
    flat = second_BXY.reshape(rows.size, -1)
    best_B = flat.argmin(axis=1)
    swapped = flat[rows, best_B] < second_BN.max(axis=1) * (1 - _MIN_GAIN)
    x_B, y_B = np.divmod(best_B, second_BXY.shape[2])
    index = rows[swapped]
    slot_BK[index, slowest.k_BX[rows, x_B][index]] = others.slot_BX[rows, y_B][index]
    slot_BK[index, others.k_BX[rows, y_B][index]] = slowest.slot_BX[rows, x_B][index]
    return swapped


def _seconds_after_swap(
    tables: CostTables, loads: Loads, slowest: _Candidates, others: _Candidates
) -> Floats:
    """Return the time of the micro-batch after each swap, (B, X, Y); inf where it exceeds memory.

    Slots keep their numbers of sequences, so latencies do not change.
    """
    row = np.arange(slowest.k_BX.shape[0])[:, None, None]
    x, y = np.ogrid[: slowest.k_BX.shape[1], : others.k_BX.shape[1]]
    local = loads.local_BN[:, None, None, :]
    sharded = loads.sharded_BN[:, None, None, :]
    gather = loads.gather_BN[:, None, None, :]
    tokens = loads.tokens_BN[:, None, None, :]
    added_length = others.length_BX[:, None, :] - slowest.length_BX[:, :, None]
    # The slots of `slowest` get the sequences of `others`; then the reverse, with opposite sign.
    for level, covers, sign in (
        (slowest.level_BX[:, :, None], slowest.covers_BXN[:, :, None, :], 1),
        (others.level_BX[:, None, :], others.covers_BXN[:, None, :, :], -1),
    ):
        attention = others.attention_BXW[row, y, level] - slowest.attention_BXW[row, x, level]
        added_tokens = others.tokens_BXW[row, y, level] - slowest.tokens_BXW[row, x, level]
        covers = covers * sign
        local = local + covers * np.where(level == 0, attention, 0)[..., None]
        sharded = sharded + covers * np.where(level > 0, attention, 0)[..., None]
        gather = gather + covers * (tables.token_W[level] * added_length)[..., None]
        tokens = tokens + covers * added_tokens[..., None]
    seconds = (np.maximum(gather, local) + sharded + tables.cost.linear(tokens)).max(axis=3)
    return np.where((tokens > tables.cost.memory_tokens).any(axis=3), np.inf, seconds)
