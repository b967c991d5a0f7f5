"""Many micro-batches at once: what seats cost, and seats for given widths of teams (LPT).

Everything here works on B micro-batches of groups of the same size side by side, so that numpy's
cost per call is shared; short ones are padded with sequences of length 0.

Legend: B micro-batches, K sequences in the longest of them, N ranks of a group, T slots (ranks
and teams, see `Slots`), W widths of a team, X rules tried per micro-batch, S seats kept of them,
C = B X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.layout import Floats, Ints, Layout, Slots


@dataclass(frozen=True, slots=True)
class Tables:
    """Costs of the sequences of B micro-batches on teams of each width."""

    length_BK: Ints
    """Tokens, longest first, 0 for padding."""
    attention_BKW: Floats
    """Seconds on each rank of a team."""
    share_BKW: Ints
    """Tokens on each rank of a team."""
    slots: Slots
    widths: Ints
    latency_W: Floats
    token_W: Floats
    """Seconds per token gathered; 0 for width 1, as the latency."""
    cost: CostModel

    @classmethod
    def of(cls, parts: Sequence[Ints], layout: Layout, cost: CostModel) -> Tables:
        """Return the tables of micro-batches, each given by its lengths, longest first."""
        most = max((part.size for part in parts), default=0)
        length_BK = np.zeros((len(parts), most), dtype=np.int64)
        for row, part in zip(length_BK, parts, strict=True):
            row[: part.size] = part
        widths = np.array(layout.widths, dtype=np.int64)
        links = [cost.link(width) for width in layout.widths]
        return cls(
            length_BK,
            cost.attention(length_BK[:, :, None], widths),
            shards(length_BK[:, :, None], widths),
            layout.slots,
            widths,
            np.array([link.latency_s for link in links]),
            np.array([link.token_s for link in links]),
            cost,
        )

    def rows(self, at: NDArray[np.int64] | NDArray[np.bool_]) -> Tables:
        """Return the tables of some of the micro-batches, in the order given."""
        return Tables(
            self.length_BK[at],
            self.attention_BKW[at],
            self.share_BKW[at],
            self.slots,
            self.widths,
            self.latency_W,
            self.token_W,
            self.cost,
        )


@dataclass(frozen=True, slots=True)
class Loads:
    """What the ranks of B micro-batches have to do, the terms of eq. (1) of `cost`."""

    local_BN: Floats
    shared_BN: Floats
    gather_BN: Floats
    tokens_BN: Floats
    count_BT: Ints
    """Sequences in each slot."""

    @classmethod
    def of(cls, tables: Tables, slot_BK: Ints) -> Loads:
        """Return the loads of sequences in their slots (-1: padding)."""
        slots, n_rows, n_slots = tables.slots, slot_BK.shape[0], tables.slots.width_T.size
        # One more slot for padding, which costs nothing and covers nobody.
        cell = np.where(slot_BK < 0, n_slots, slot_BK)
        level_BK = np.append(slots.level_T, 0)[cell]
        cell = (cell + np.arange(n_rows)[:, None] * (n_slots + 1)).ravel()
        flat = np.arange(cell.size) * tables.widths.size + level_BK.ravel()

        def per_slot(value: Floats | Ints) -> Floats:
            sums: Floats = np.bincount(cell, value, n_rows * (n_slots + 1)).astype(np.float64)
            return sums.reshape(n_rows, n_slots + 1)[:, :n_slots]

        attention_BT = per_slot(tables.attention_BKW.ravel()[flat])
        tokens_BT = per_slot(tables.share_BKW.ravel()[flat])
        volume_BT = per_slot(tables.length_BK.ravel())
        count_BT = np.bincount(cell, minlength=n_rows * (n_slots + 1))
        count_BT = count_BT.reshape(n_rows, n_slots + 1)[:, :n_slots]
        gather_BT = volume_BT * tables.token_W[slots.level_T]
        gather_BT += (count_BT > 0) * tables.latency_W[slots.level_T]
        n_ranks = slots.covers_TN.shape[1]
        return cls(
            attention_BT[:, :n_ranks],
            attention_BT[:, n_ranks:] @ slots.covers_TN[n_ranks:],
            gather_BT[:, n_ranks:] @ slots.covers_TN[n_ranks:],
            tokens_BT @ slots.covers_TN,
            count_BT,
        )

    def rows(self, at: Ints) -> Loads:
        """Return the loads of some of the micro-batches."""
        return Loads(
            self.local_BN[at],
            self.shared_BN[at],
            self.gather_BN[at],
            self.tokens_BN[at],
            self.count_BT[at],
        )

    def seconds(self, cost: CostModel) -> Floats:
        """Return the time of every rank, shape (B, N)."""
        busy = np.maximum(self.gather_BN, self.local_BN)
        return busy + self.shared_BN + cost.linear(self.tokens_BN)


def first_seats(tables: Tables, level_BXK: Ints, starts: int) -> tuple[Ints, Floats]:
    """Return the best seats and their times, the best first, shapes (B, S, K) and (B, S).

    Args:
        tables: Costs of the micro-batches.
        level_BXK: The rules tried: the width of each sequence's team; see `rules`.
        starts: How many seats of a micro-batch are wanted, S, at most X.
    """
    n_rows, tried, _ = level_BXK.shape
    many = tables.rows(np.repeat(np.arange(n_rows), tried))
    slot_CK = _seat(many, level_BXK.reshape(n_rows * tried, -1))
    second_C = Loads.of(many, slot_CK).seconds(tables.cost).max(axis=1)
    lost = (slot_CK < 0) & (many.length_BK > 0)
    second_C[lost.any(axis=1)] = np.inf
    second_BX = second_C.reshape(n_rows, tried)
    best_BS = np.argsort(second_BX, axis=1, kind="stable")[:, :starts]
    slot_BXK = slot_CK.reshape(level_BXK.shape)
    return (
        np.take_along_axis(slot_BXK, best_BS[:, :, None], axis=1),
        np.take_along_axis(second_BX, best_BS, axis=1),
    )


def _seat(tables: Tables, level_CK: Ints) -> Ints:
    """Return the slot of every sequence given its level, shape (C, K); -1 all along: no room.

    Row by row in plain Python: a heap of few ranks is faster than numpy on every row at once.
    """
    row, col = np.ogrid[: level_CK.shape[0], : level_CK.shape[1]]
    share_CK = tables.share_BKW[row, col, level_CK]
    load_CK = tables.attention_BKW[row, col, level_CK] + tables.cost.linear_s * share_CK
    load_CK += tables.latency_W[level_CK] + tables.token_W[level_CK] * tables.length_BK
    count_C = np.count_nonzero(tables.length_BK, axis=1)
    slot_CK = np.full(level_CK.shape, -1)
    columns = (count_C, level_CK, share_CK, load_CK, slot_CK)
    for count, level_K, share_K, load_K, slot_K in zip(*columns, strict=True):
        table = _Table(tables)
        seats = [level_K[:count].tolist(), share_K[:count].tolist(), load_K[:count].tolist()]
        found = table.seat(*seats)
        if found is not None:
            slot_K[:count] = found
    return slot_CK


class _Table:
    """The ranks of one group while sequences are seated: tokens held, seconds of work."""

    def __init__(self, tables: Tables) -> None:
        self._widths = tables.widths.tolist()
        self._ranks = tables.slots.covers_TN.shape[1]
        self._last = tables.slots.width_T.size - 1
        self._room = tables.cost.memory_tokens
        self._tokens = [0] * self._ranks
        self._load = [0.0] * self._ranks

    def seat(self, level: list[int], share: list[int], load: list[float]) -> list[int] | None:
        """Return the slots of sequences whose levels never rise, or None if one has no room.

        Those over the whole group have one slot only. The others, the longest first, go to the
        slot of their width whose busiest rank has least to do.
        """
        whole, teams = len(self._widths) - 1, 0
        # Within a group of one rank, local is whole.
        while whole and teams < len(level) and level[teams] == whole:
            teams += 1
        self._tokens = [sum(share[:teams])] * self._ranks
        self._load = [sum(load[:teams])] * self._ranks
        if self._tokens[0] > self._room:
            return None
        slots = [self._last] * teams
        for k in range(teams, len(level)):
            if not level[k]:
                break
            slot = self._team(level[k], share[k], load[k])
            if slot < 0:
                return None
            slots.append(slot)
        return self._alone(slots, share, load)

    def _team(self, level: int, share: int, seconds: float) -> int:
        width, best, least = self._widths[level], -1, np.inf
        for first in range(0, self._ranks, width):
            team = slice(first, first + width)
            if max(self._load[team]) < least and max(self._tokens[team]) + share <= self._room:
                best, least = first, max(self._load[team])
        if best < 0:
            return -1
        for rank in range(best, best + width):
            self._tokens[rank] += share
            self._load[rank] += seconds
        return sum(self._ranks // narrow for narrow in self._widths[:level]) + best // width

    def _alone(self, slots: list[int], share: list[int], load: list[float]) -> list[int] | None:
        """Seat the rest on single ranks, by LPT among those with room."""
        heap = [(seconds, rank) for rank, seconds in enumerate(self._load)]
        heapify(heap)
        tokens, room = self._tokens, self._room
        begin = len(slots)
        for held, work in zip(share[begin:], load[begin:], strict=True):
            seconds, rank = heap[0]
            full = []
            while tokens[rank] + held > room:
                full.append(heappop(heap))
                if not heap:
                    return None
                seconds, rank = heap[0]
            heapreplace(heap, (seconds + work, rank))
            tokens[rank] += held
            slots.append(rank)
            for item in full:
                heappush(heap, item)
        return slots
