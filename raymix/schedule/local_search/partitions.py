"""Cutting groups' sequences into micro-batches, seating and improving all of them side by side.

Legend: K sequences of the batch, longest first; M micro-batches of a group; see `seating`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import Split, alike, balanced, fewest, strided
from raymix.schedule.layout import Floats, Ints, Layout
from raymix.schedule.local_search.assignment import Loads, Tables, first_seats
from raymix.schedule.local_search.moves import improve, inserted
from raymix.schedule.local_search.rules import estimates, rules

_SPLITS: tuple[Split, ...] = (balanced, strided, alike)
# Below this part of the memory, cutting into more micro-batches than needed cannot pay: two
# micro-batches whose seats fit in one are never slower as one.
_SLACK = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBudget:
    """How much is tried."""

    annealed: bool
    """Whether all starts are followed, and annealed in the end; else only the fastest is."""
    more: int
    """Micro-batches tried beyond the fewest, where memory is short."""
    seated: int
    """Cuts of a group that are seated; the others are only estimated."""
    rules: int
    """Rules of each kind that are tried in a micro-batch."""
    dense: bool
    """Whether more rules of several widths are judged."""
    starts: int
    """Seats of a micro-batch that are improved by moves."""
    kept: int
    """Cuts of a group that are improved by moves."""
    moves: int
    """Moves in a micro-batch, at most."""
    moves_after: int
    """The same after a trade."""
    rules_after: int
    """Rules of each kind that are tried after a trade."""
    starts_after: int
    """Seats found anew after a trade, besides those with the new sequence put in."""
    tried: int
    """Sequences of the slowest rank that are tried in a move."""
    swapped: int
    """Others to swap them with."""
    even: float
    """Ranks that wait for less than this part of the time are balanced well enough."""
    rounds: int
    """Rounds of trades, at most."""
    drawn: int
    """Trades drawn per round and pair, besides those chosen by size."""
    patience: int
    """Rounds without a gain after which trading goes on."""
    worth: float
    """What counts as a gain, as a part of the time."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A group's sequences cut into micro-batches, and where they sit."""

    group: int
    parts: list[Ints]
    """Sequences of each micro-batch, by position in the batch, rising."""
    slots: list[Ints]
    """Their slots, the best first, (S, K) each; none where they are not seated yet."""
    second_M: Floats
    """Time of each micro-batch with the first of these."""

    @property
    def seconds(self) -> float:
        """Return the time of the group."""
        return float(self.second_M.sum())


_UNKNOWN = np.full(1, np.inf)


@dataclass(frozen=True, slots=True)
class Cutter:
    """Finds cuts of a batch's groups."""

    length_K: Ints
    layout: Layout
    cost: CostModel
    effort: SearchBudget

    def split(self, groups: Sequence[Ints]) -> list[Cut]:
        """Return the most promising cuts of each group, given its sequences, rising."""
        cuts: list[Cut] = []
        for group, ids in enumerate(groups):
            n = fewest(self.length_K[ids], self.layout, self.cost)
            while not (found := self._split(group, ids, n)):
                n += 1
            cuts += found
            most = min(n + self.effort.more, ids.size) if self._short(ids, n) else n
            for more in range(n + 1, most + 1):
                cuts += self._split(group, ids, more)
        return fastest(self._estimated(cuts), self.effort.seated)

    def _estimated(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Return the cuts with estimated times."""
        tables = self._tables(cuts)
        return list(cuts) if tables is None else _filled(cuts, [], estimates(tables))

    def seated(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Return the cuts with the best seats by rules of width."""
        tables = self._tables(cuts)
        return (
            list(cuts) if tables is None else _filled(cuts, *self._first(tables, self.effort.rules))
        )

    def improved(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Return the best cut of each group after moves; only the best few of each are moved."""
        return fastest(self._moved(fastest(cuts, self.effort.kept), self.effort.moves), 1)

    def traded(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Return cuts after trades, improved; a sequence that has just come has the slot -1."""
        tables = self._tables(cuts)
        if tables is None:
            return list(cuts)
        seats = [slot_SK for cut in cuts for slot_SK in cut.slots]
        slot_BK = inserted(tables, _matrix(tables, seats))
        fits_B = ((slot_BK >= 0) | (tables.length_BK == 0)).all(axis=1)
        found = [slot_K[None] if fits else slot_K[None][:0]
                 for slot_K, fits in zip(slot_BK, fits_B.tolist(), strict=True)]  # fmt: skip
        at = np.flatnonzero(~fits_B | (self.effort.starts_after > 0))
        if at.size:
            fresh, _ = self._first(tables.rows(at), self.effort.rules_after)
            for row, slot_SK in zip(at.tolist(), fresh, strict=True):
                found[row] = np.vstack([found[row], slot_SK[: max(1, self.effort.starts_after)]])
        return self._moved(_filled(cuts, found, np.zeros(len(found))), self.effort.moves_after)

    def _first(self, tables: Tables, most: int) -> tuple[list[Ints], Floats]:
        """Return seats by rules, (S, K) for each micro-batch, and the time with the first."""
        effort = self.effort
        level_BXK = rules(tables, most, dense=effort.dense)
        slot_BSK, second_BS = first_seats(tables, level_BXK, effort.starts)
        fits_BS = second_BS < np.inf
        return [slot_SK[fits] for slot_SK, fits in zip(slot_BSK, fits_BS, strict=True)], second_BS[
            :, 0
        ]

    def _moved(self, cuts: Sequence[Cut], moves: int) -> list[Cut]:
        """Return the cuts with the best of their slots after moves."""
        tables = self._tables(cuts)
        if tables is None:
            return list(cuts)
        seats = [slot_SK for cut in cuts for slot_SK in cut.slots]
        count_B = np.array([slot_SK.shape[0] for slot_SK in seats])
        many = tables.rows(np.repeat(np.arange(count_B.size), count_B))
        slot_CK = improve(many, _matrix(many, seats), moves, self.effort)
        second_C = Loads.of(many, slot_CK).seconds(self.cost).max(axis=1)
        begin_B = np.cumsum(count_B) - count_B
        ends = zip(begin_B.tolist(), (begin_B + count_B).tolist(), strict=True)
        best_B = [begin + int(second_C[begin:end].argmin()) for begin, end in ends]
        return _filled(cuts, [slot_CK[at : at + 1] for at in best_B], second_C[best_B])

    def of_placement(self, group: int, ids: Ints, placed: Placement) -> Cut:
        """Return the cut of one group that a placement makes; its times are not known yet."""
        slots, width_K = self.layout.slots, placed.width_K[ids]
        # Slots of one width follow each other in the order of their first ranks.
        begin_K = np.searchsorted(slots.width_T, width_K)
        slot_K = begin_K + placed.first_K[ids] % self.layout.context // width_K
        micro_K = placed.micro_K[ids]
        at = [np.flatnonzero(micro_K == micro) for micro in np.unique(micro_K)]
        return Cut(group, [ids[x] for x in at], [slot_K[None, x] for x in at], np.zeros(len(at)))

    def _tables(self, cuts: Sequence[Cut]) -> Tables | None:
        parts = [self.length_K[part] for cut in cuts for part in cut.parts]
        return Tables.of(parts, self.layout, self.cost) if parts else None

    def _split(self, group: int, ids: Ints, n: int) -> list[Cut]:
        """Return cuts into at most n micro-batches, by every way that works."""
        if not ids.size:
            return [Cut(group, [], [], np.zeros(0))]
        ways = _SPLITS if n > 1 else _SPLITS[:1]
        found = [split(self.length_K[ids], n, self.layout, self.cost) for split in ways]
        return [
            Cut(group, [ids[part] for part in parts if part.size], [], _UNKNOWN)
            for parts in found
            if parts is not None
        ]

    def _short(self, ids: Ints, n: int) -> bool:
        """Return whether memory is so short that more than n micro-batches may be faster."""
        room = n * self.cost.memory_tokens * self.layout.context
        return int(self.length_K[ids].sum()) > _SLACK * room


def _matrix(tables: Tables, seats: Sequence[Ints]) -> Ints:
    """Return all the slots (S, K) one below the other, -1 for padding, shape (C, K)."""
    slot_CK = np.full((sum(slot_SK.shape[0] for slot_SK in seats), tables.length_BK.shape[1]), -1)
    begin = 0
    for slot_SK in seats:
        end = begin + slot_SK.shape[0]
        slot_CK[begin:end, : slot_SK.shape[1]] = slot_SK
        begin = end
    return slot_CK


def _filled(cuts: Sequence[Cut], seats: Sequence[Ints], second_B: Floats) -> list[Cut]:
    """Return the cuts with slots and times of all their parts in order; seats may be none."""
    found: list[Cut] = []
    row = 0
    for cut in cuts:
        rows = slice(row, row + len(cut.parts))
        row = rows.stop
        pairs = zip(seats[rows], cut.parts, strict=False)
        slots = [slot_SK[:, : part.size] for slot_SK, part in pairs]
        found.append(Cut(cut.group, cut.parts, slots, second_B[rows]))
    return found


def fastest(cuts: Sequence[Cut], kept: int) -> list[Cut]:
    """Return the fastest cuts, at most `kept` of each group, group by group."""
    order = sorted(range(len(cuts)), key=lambda at: (cuts[at].group, cuts[at].seconds, at))
    taken: dict[int, list[Cut]] = {}
    for at in order:
        mine = taken.setdefault(cuts[at].group, [])
        if len(mine) < kept:
            mine.append(cuts[at])
    return [cut for mine in taken.values() for cut in mine]
