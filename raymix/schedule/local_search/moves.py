"""Best-improving moves in many micro-batches at once, until none shortens its slowest rank.

A move takes a sequence off the slowest rank: to another rank or team, sharded or not. Where no
move helps, two sequences may change places. Only sequences that the slowest rank works on can
shorten a micro-batch, so only these are tried.

Legend as in `seating`; X sequences of the slowest rank that are tried, Y others to swap with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raymix.schedule.layout import Floats, Ints
from raymix.schedule.local_search.assignment import Loads, Tables

Bools = NDArray[np.bool_]
# Local, shared, gather and tokens: see `Loads`.
_Terms = tuple[Floats, Floats, Floats, Floats]

# A move must shorten the micro-batch by this part of it, else rounding might go in circles.
_GAIN = 1e-6


class Limits(Protocol):
    """How much `improve` tries."""

    @property
    def even(self) -> float:
        """Where ranks wait for less than this part of the time, swaps are not tried."""
        ...

    @property
    def tried(self) -> int:
        """Sequences of the slowest rank that are tried."""
        ...

    @property
    def swapped(self) -> int:
        """Others to swap them with."""
        ...


def improve(tables: Tables, slot_BK: Ints, rounds: int, limits: Limits) -> Ints:
    """Return slots at least as good as those given, shape (B, K).

    Args:
        tables: Costs of the micro-batches.
        slot_BK: Slots of the sequences, -1 for padding; must fit in memory.
        rounds: Most moves per micro-batch.
        limits: What is tried for a move.
    """
    slot_BK = slot_BK.copy()
    open_ = np.arange(slot_BK.shape[0])
    mine, seats = tables, slot_BK.copy()
    for _ in range(rounds):
        loads = Loads.of(mine, seats)
        second_BN = loads.seconds(mine.cost)
        moved = _move(mine, seats, loads, second_BN, limits.tried)
        waiting = second_BN.mean(axis=1) < second_BN.max(axis=1) * (1 - limits.even)
        stuck = np.flatnonzero(~moved & waiting)
        if stuck.size:
            again = seats[stuck]
            moved[stuck] = _swap(mine.rows(stuck), again, loads.rows(stuck), limits)
            seats[stuck] = again
        if not moved.all():
            slot_BK[open_] = seats
            open_ = open_[moved]
            mine, seats = tables.rows(open_), slot_BK[open_]
        if not open_.size:
            return slot_BK
    slot_BK[open_] = seats
    return slot_BK


@dataclass(frozen=True, slots=True)
class _Picked:
    """Some sequences of each micro-batch with their costs; what is not real is filling."""

    k_BX: Ints
    real_BX: Bools
    length_BX: Ints
    slot_BX: Ints
    level_BX: Ints
    attention_BXW: Floats
    share_BXW: Ints
    covers_BXN: Floats

    @classmethod
    def of(cls, tables: Tables, slot_BK: Ints, wanted_BK: Bools, most: int) -> _Picked:
        """Pick at most `most` of those wanted, evenly from long to short."""
        count_B = wanted_BK.sum(axis=1, keepdims=True)
        tried_B = np.minimum(count_B, most)
        turn_BK = wanted_BK.cumsum(axis=1)
        whole = np.maximum(count_B, 1)
        # Of n in a row the i-th is picked where i * tried / n passes a whole number.
        picked = wanted_BK & (turn_BK * tried_B // whole > (turn_BK - 1) * tried_B // whole)
        width = int(tried_B.max(initial=0))
        k_BX = np.argsort(~picked, axis=1, kind="stable")[:, :width]
        row = np.arange(k_BX.shape[0])[:, None]
        slot_BX = np.maximum(slot_BK[row, k_BX], 0)
        return cls(
            k_BX,
            picked[row, k_BX],
            tables.length_BK[row, k_BX],
            slot_BX,
            tables.slots.level_T[slot_BX],
            tables.attention_BKW[row, k_BX],
            tables.share_BKW[row, k_BX],
            tables.slots.covers_TN[slot_BX],
        )


def _on_slowest(tables: Tables, slot_BK: Ints, second_BN: Floats) -> Bools:
    """Return which sequences the slowest rank of their micro-batch works on, shape (B, K)."""
    # One more slot, for padding, that covers no rank.
    covers_TN = np.vstack([tables.slots.covers_TN > 0, np.zeros(second_BN.shape[1], np.bool_)])
    return covers_TN[slot_BK, second_BN.argmax(axis=1)[:, None]]


def _move(tables: Tables, slot_BK: Ints, loads: Loads, second_BN: Floats, tried: int) -> Bools:
    """Make the best single move in each micro-batch; return where there was one, shape (B,)."""
    picked = _Picked.of(tables, slot_BK, _on_slowest(tables, slot_BK, second_BN), tried)
    taken = picked.slot_BX[:, :, None] == np.arange(tables.slots.width_T.size)
    count_BXT = loads.count_BT[:, None, :] - taken
    second_BXT = _after_move(tables, _without(tables, loads, picked), count_BXT, picked)
    second_BXT[~picked.real_BX] = np.inf
    rows = np.arange(slot_BK.shape[0])
    flat = second_BXT.reshape(rows.size, -1)
    best_B = flat.argmin(axis=1)
    moved = flat[rows, best_B] < second_BN.max(axis=1) * (1 - _GAIN)
    x_B, slot_B = np.divmod(best_B, second_BXT.shape[2])
    slot_BK[rows[moved], picked.k_BX[rows, x_B][moved]] = slot_B[moved]
    return moved


def inserted(tables: Tables, slot_BK: Ints) -> Ints:
    """Return slots with a sequence without one, at most one of each micro-batch, in the best.

    It stays without one (-1) where none has room.
    """
    slot_BK = slot_BK.copy()
    picked = _Picked.of(tables, slot_BK, (slot_BK < 0) & (tables.length_BK > 0), 1)
    if not picked.k_BX.size:
        return slot_BK
    loads = Loads.of(tables, slot_BK)
    rest = (
        loads.local_BN[:, None],
        loads.shared_BN[:, None],
        loads.gather_BN[:, None],
        loads.tokens_BN[:, None],
    )
    second_BT = _after_move(tables, rest, loads.count_BT[:, None, :], picked)[:, 0]
    best_B = second_BT.argmin(axis=1)
    rows = np.arange(best_B.size)
    at = np.flatnonzero(picked.real_BX[:, 0] & (second_BT[rows, best_B] < np.inf))
    slot_BK[at, picked.k_BX[at, 0]] = best_B[at]
    return slot_BK


def _after_move(tables: Tables, rest: _Terms, count_BXT: Ints, picked: _Picked) -> Floats:
    """Return the time of the micro-batch with a sequence in each slot, (B, X, T); inf: no room.

    Args:
        tables: Costs of the micro-batches.
        rest: Loads of the ranks without the sequence.
        count_BXT: Other sequences in each slot.
        picked: The sequences.
    """
    cost, room = tables.cost, tables.cost.memory_tokens
    n_ranks = tables.slots.covers_TN.shape[1]
    local, shared, gather, tokens = rest
    busy = np.maximum(gather, local)
    now = busy + shared + cost.linear(tokens)
    # Whole on a rank: only that rank's time changes.
    held = tokens + picked.share_BXW[:, :, :1]
    alone = np.maximum(gather, local + picked.attention_BXW[:, :, :1]) + shared + cost.linear(held)
    found = [np.where(held > room, np.inf, np.maximum(alone, _others(now)))]
    for slot in range(n_ranks, tables.slots.width_T.size):
        level, covers = int(tables.slots.level_T[slot]), tables.slots.covers_TN[slot]
        held = tokens + covers * picked.share_BXW[:, :, level, None]
        added = tables.token_W[level] * picked.length_BX
        added = added + tables.latency_W[level] * (count_BXT[:, :, slot] == 0)
        busy = np.maximum(gather + covers * added[:, :, None], local)
        part = covers * picked.attention_BXW[:, :, level, None]
        seconds = (busy + shared + part + cost.linear(held)).max(axis=2)
        found.append(np.where((held > room).any(axis=2), np.inf, seconds)[:, :, None])
    return np.concatenate(found, axis=2)


def _without(tables: Tables, loads: Loads, picked: _Picked) -> _Terms:
    """Return local, shared, gather and tokens of the ranks without each sequence, (B, X, N)."""
    row, col = np.ogrid[: picked.k_BX.shape[0], : picked.k_BX.shape[1]]
    level = picked.level_BX[:, :, None]
    attention = picked.attention_BXW[row, col, picked.level_BX][:, :, None]
    share = picked.share_BXW[row, col, picked.level_BX][:, :, None]
    last = loads.count_BT[row, picked.slot_BX] == 1
    gather = tables.token_W[picked.level_BX] * picked.length_BX
    gather = (gather + tables.latency_W[picked.level_BX] * last)[:, :, None]
    covers = picked.covers_BXN
    return (
        loads.local_BN[:, None] - covers * np.where(level == 0, attention, 0),
        loads.shared_BN[:, None] - covers * np.where(level > 0, attention, 0),
        loads.gather_BN[:, None] - covers * gather,
        loads.tokens_BN[:, None] - covers * share,
    )


def _others(second_BXN: Floats) -> Floats:
    """Return the largest of the other ranks' values, per rank."""
    if second_BXN.shape[2] == 1:
        return np.zeros_like(second_BXN)
    top = np.partition(second_BXN, -2, axis=2)[:, :, -2:]
    return np.where(second_BXN == top[:, :, 1:], top[:, :, :1], top[:, :, 1:])


def _swap(tables: Tables, slot_BK: Ints, loads: Loads, limits: Limits) -> Bools:
    """Make the best swap in each micro-batch; return where there was one, shape (B,)."""
    second_BN = loads.seconds(tables.cost)
    on_BK = _on_slowest(tables, slot_BK, second_BN)
    ours = _Picked.of(tables, slot_BK, on_BK, limits.tried)
    theirs = _Picked.of(tables, slot_BK, ~on_BK & (slot_BK >= 0), limits.swapped)
    second_BXY = _after_swap(tables, loads, ours, theirs)
    second_BXY[~(ours.real_BX[:, :, None] & theirs.real_BX[:, None, :])] = np.inf
    rows = np.arange(slot_BK.shape[0])
    if not second_BXY.size:
        return np.zeros(rows.size, dtype=np.bool_)
    flat = second_BXY.reshape(rows.size, -1)
    best_B = flat.argmin(axis=1)
    swapped = flat[rows, best_B] < second_BN.max(axis=1) * (1 - _GAIN)
    x_B, y_B = np.divmod(best_B, second_BXY.shape[2])
    at = rows[swapped]
    slot_BK[at, ours.k_BX[rows, x_B][at]] = theirs.slot_BX[rows, y_B][at]
    slot_BK[at, theirs.k_BX[rows, y_B][at]] = ours.slot_BX[rows, x_B][at]
    return swapped


def _after_swap(tables: Tables, loads: Loads, ours: _Picked, theirs: _Picked) -> Floats:
    """Return the time of the micro-batch after each swap, (B, X, Y); inf where it has no room.

    A slot keeps its number of sequences, so no latency comes or goes.
    """
    row = np.arange(ours.k_BX.shape[0])[:, None, None]
    x, y = np.ogrid[: ours.k_BX.shape[1], : theirs.k_BX.shape[1]]
    local = loads.local_BN[:, None, None, :]
    shared = loads.shared_BN[:, None, None, :]
    gather = loads.gather_BN[:, None, None, :]
    tokens = loads.tokens_BN[:, None, None, :]
    longer = theirs.length_BX[:, None, :] - ours.length_BX[:, :, None]
    # First the slots of ours get theirs, then the other way round.
    for level, covers, sign in (
        (ours.level_BX[:, :, None], ours.covers_BXN[:, :, None, :], 1),
        (theirs.level_BX[:, None, :], theirs.covers_BXN[:, None, :, :], -1),
    ):
        attention = theirs.attention_BXW[row, y, level] - ours.attention_BXW[row, x, level]
        share = theirs.share_BXW[row, y, level] - ours.share_BXW[row, x, level]
        covers = covers * sign
        local = local + covers * np.where(level == 0, attention, 0)[..., None]
        shared = shared + covers * np.where(level > 0, attention, 0)[..., None]
        gather = gather + covers * (tables.token_W[level] * longer)[..., None]
        tokens = tokens + covers * share[..., None]
    seconds = (np.maximum(gather, local) + shared + tables.cost.linear(tokens)).max(axis=3)
    return np.where((tokens > tables.cost.memory_tokens).any(axis=3), np.inf, seconds)
