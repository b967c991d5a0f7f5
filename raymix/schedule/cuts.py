"""Cutting groups' sequences into micro-batches, seating and improving all of them side by side.

Legend: K sequences of the batch, longest first; M micro-batches of a group; see `seating`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost import CostModel
from raymix.schedule.group import Split, alike, balanced, fewest, strided
from raymix.schedule.layout import Floats, Ints, Layout
from raymix.schedule.moves import improve
from raymix.schedule.seating import Loads, Tables, estimates, first_seats
from raymix.schedule.timing import Placement

_SPLITS: tuple[Split, ...] = (balanced, strided, alike)
# Below this part of the memory, cutting into more micro-batches than needed cannot pay: two
# micro-batches whose seats fit in one are never slower as one.
_SLACK = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is tried."""

    more: int
    """Micro-batches tried beyond the fewest, where memory is short."""
    seated: int
    """Cuts of a group that are seated; the others are only estimated."""
    kept: int
    """Cuts of a group that are improved by moves."""
    moves: int
    """Moves in a micro-batch, at most."""
    moves_after: int
    """The same after a trade."""
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
    """Their slots; none where they are not seated yet."""
    second_M: Floats
    """Time of each micro-batch."""

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
    effort: Effort

    def best(self, groups: Sequence[Ints]) -> list[Cut]:
        """Return the best cut found for each group, given its sequences, rising."""
        cuts: list[Cut] = []
        for group, ids in enumerate(groups):
            n = fewest(self.length_K[ids], self.layout, self.cost)
            while not (found := self._split(group, ids, n)):
                n += 1
            cuts += found
            most = min(n + self.effort.more, ids.size) if self._short(ids, n) else n
            for more in range(n + 1, most + 1):
                cuts += self._split(group, ids, more)
        return self.improved(self.seated(_best(self._estimated(cuts), self.effort.seated)))

    def _estimated(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Return the cuts with estimated times."""
        tables = self._tables(cuts)
        return list(cuts) if tables is None else _filled(cuts, None, estimates(tables))

    def seated(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Return the cuts with the best seats by cut-offs of length."""
        tables = self._tables(cuts)
        return list(cuts) if tables is None else _filled(cuts, *first_seats(tables))

    def improved(self, cuts: Sequence[Cut], moves: int | None = None) -> list[Cut]:
        """Return the best cut of each group after moves; only the best few of each are moved."""
        kept = _best(cuts, self.effort.kept)
        tables = self._tables(kept)
        if tables is None:
            return kept
        slot_BK = np.full(tables.length_BK.shape, -1)
        slots = [slot_K for cut in kept for slot_K in cut.slots]
        for row, slot_K in zip(slot_BK, slots, strict=True):
            row[: slot_K.size] = slot_K
        slot_BK = improve(tables, slot_BK, moves or self.effort.moves, self.effort.even)
        second_B = Loads.of(tables, slot_BK).seconds(self.cost).max(axis=1)
        return _best(_filled(kept, slot_BK, second_B), 1)

    def of_placement(self, group: int, ids: Ints, placed: Placement) -> Cut:
        """Return the cut of one group that a placement makes; its times are not known yet."""
        slots, width_K = self.layout.slots, placed.width_K[ids]
        # Slots of one width follow each other in the order of their first ranks.
        begin_K = np.searchsorted(slots.width_T, width_K)
        slot_K = begin_K + placed.first_K[ids] % self.layout.context // width_K
        micro_K = placed.micro_K[ids]
        at = [np.flatnonzero(micro_K == micro) for micro in np.unique(micro_K)]
        return Cut(group, [ids[x] for x in at], [slot_K[x] for x in at], np.zeros(len(at)))

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


def _filled(cuts: Sequence[Cut], slot_BK: Ints | None, second_B: Floats) -> list[Cut]:
    """Return the cuts with slots, if any, and times of arrays that hold their parts in order."""
    found: list[Cut] = []
    row = 0
    for cut in cuts:
        rows = range(row, row + len(cut.parts))
        row += len(rows)
        slots: list[Ints] = []
        if slot_BK is not None:
            slots = [slot_BK[at, : part.size] for at, part in zip(rows, cut.parts, strict=True)]
        found.append(Cut(cut.group, cut.parts, slots, second_B[rows.start : rows.stop]))
    return found


def _best(cuts: Sequence[Cut], kept: int) -> list[Cut]:
    """Return the fastest cuts, at most `kept` of each group, group by group."""
    order = sorted(range(len(cuts)), key=lambda at: (cuts[at].group, cuts[at].seconds, at))
    taken: dict[int, list[Cut]] = {}
    for at in order:
        mine = taken.setdefault(cuts[at].group, [])
        if len(mine) < kept:
            mine.append(cuts[at])
    return [cut for mine in taken.values() for cut in mine]
