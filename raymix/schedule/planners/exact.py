"""`milp`: the best schedule there is, by an integer program; for small batches.

The problem of Skrull's eq. (8) to (11) with the cost model of `cost` and all slots of the layout:
which micro-batch of which group and which slot each sequence takes, so that the group that ends
last ends soonest. Exact, unless the limit of the search comes first, among schedules of at most one
micro-batch more than are needed. Groups, micro-batches and ranks are interchangeable, so the i-th
longest sequence may be confined to the first i of each: without that, proofs take far longer.

Legend: K sequences, G groups, M micro-batches of a group, T slots, N ranks of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raymix.errors import ScheduleError
from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import Draft
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.planners.integer_program import Program, Solution

MOST_CHOICES = 6_000
"""Most combinations of sequence and place that are tried."""
_GAP, _NODES = 1e-4, 20_000


@dataclass(frozen=True, slots=True)
class Exact:
    """The best placement and what is proved of it."""

    placed: Placement
    seconds: float
    """Time by the cost model."""
    bound: float
    """No placement takes less, of as many micro-batches."""


@planner("milp")
def milp(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the best placement."""
    return solve_exact(length_K, layout, cost).placed


def solve_exact(
    length_K: Ints, layout: Layout, cost: CostModel, *, gap: float = _GAP, nodes: int = _NODES
) -> Exact:
    """Return the best placement of sequences, longest first, and a bound on all others.

    Barriers of "none" are treated as "group": its times are then above what they could be.

    Raises:
        ScheduleError: If the batch is too large, or the search ended before it found a placement.
    """
    tokens = int(length_K.sum())
    most = max(1, -(-tokens // (cost.memory_tokens * layout.ranks))) + 1
    while most <= length_K.size + 1:
        model = _ScheduleProgram(length_K, layout, cost, min(most, length_K.size))
        found = model.program.solve(gap=gap, nodes=nodes)
        if found is not None:
            return Exact(model.placement(found), found.objective, found.bound)
        most += 1
    raise ScheduleError.at(
        "lengths", length_K.size, f"no placement found in {nodes} nodes", fix="Use planner='refine'"
    )


class _ScheduleProgram:
    """The integer program of one batch and the place that each variable stands for."""

    def __init__(self, length_K: Ints, layout: Layout, cost: CostModel, micro: int) -> None:
        self.layout = layout
        self.cost = cost
        self.length_K = length_K
        self.program = Program()
        slots = layout.slots
        self._share_KT = shards(length_K[:, None], slots.width_T)
        self._attention_KT = cost.attention(length_K[:, None], slots.width_T)
        places = [
            (k, group, m, slot)
            for k in range(length_K.size)
            for group in range(min(layout.groups, k + 1))
            for m in range(min(micro, k + 1))
            for slot in self._slots_of(k)
        ]
        if len(places) > MOST_CHOICES:
            raise ScheduleError.at(
                "lengths",
                f"{length_K.size} lengths",
                f"{len(places)} places for an exact plan, at most {MOST_CHOICES} are tried",
                fix="Plan fewer sequences, or use planner='refine'",
            )
        self.place_P = np.array(places, dtype=np.int64).T
        self.chosen_P = self.program.variables(len(places), upper=1, whole=True)
        self._once()
        self._times(micro)

    def _slots_of(self, k: int) -> Iterator[int]:
        """Yield the slots of a sequence: by symmetry, the first ones for the longest."""
        slots, widths = self.layout.slots, self.layout.widths
        widest = widths[-2] if len(widths) > 1 else 1
        for slot, first in enumerate(slots.first_T.tolist()):
            if first <= k * widest and self._share_KT[k, slot] <= self.cost.memory_tokens:
                yield slot

    def _once(self) -> None:
        """Every sequence has one place."""
        for k in range(self.length_K.size):
            self.program.row(self.chosen_P[self.place_P[0] == k], 1.0, low=1, high=1)

    def _times(self, micro: int) -> None:
        """The objective is at least the time of every group."""
        program, layout = self.program, self.layout
        (total,) = program.variables(1, cost=1.0)
        second_GM = program.variables(layout.groups * micro).reshape(layout.groups, micro)
        if layout.barrier == "all":
            second_GM[1:] = second_GM[0]
        for group in range(layout.groups):
            at = np.append(second_GM[group], total)
            program.row(at, np.append(np.ones(micro), -1.0), high=0)
            for m in range(micro):
                self._micro_batch(group, m, int(second_GM[group, m]))

    def _micro_batch(self, group: int, micro: int, seconds: int) -> None:
        _, group_P, micro_P, slot_P = self.place_P
        mine = np.flatnonzero((group_P == group) & (micro_P == micro))
        slots, n_ranks = self.layout.slots, self.layout.context
        used_T = self.program.variables(slots.width_T.size, upper=1)
        for place in mine[slot_P[mine] >= n_ranks].tolist():
            at = np.array([used_T[slot_P[place]], self.chosen_P[place]])
            self.program.row(at, np.array([1.0, -1.0]), low=0)
        for rank in range(n_ranks):
            here = mine[slots.covers_TN[slot_P[mine], rank] > 0]
            if here.size:
                self._rank(rank, here, used_T, seconds)

    def _rank(self, rank: int, here: Ints, used_T: Ints, seconds: int) -> None:
        """One rank of a micro-batch: its memory, and eq. (1) of `cost` term by term."""
        program, cost, slots = self.program, self.cost, self.layout.slots
        k_P, slot_P = self.place_P[0, here], self.place_P[3, here]
        chosen = self.chosen_P[here]
        share, attention = self._share_KT[k_P, slot_P], self._attention_KT[k_P, slot_P]
        local = slot_P < self.layout.context
        overlap, linear, active = program.variables(3, upper=np.array([np.inf, np.inf, 1]))
        program.row(chosen, share, high=cost.memory_tokens)
        program.row(np.append(chosen[local], overlap), np.append(attention[local], -1.0), high=0)
        teams = np.flatnonzero(slots.covers_TN[:, rank])[1:]
        links = {slot: cost.link(int(slots.width_T[slot])) for slot in teams.tolist()}
        volume = [links[s].token_s * self.length_K[k] if s in links else 0.0
                  for k, s in zip(k_P.tolist(), slot_P.tolist(), strict=True)]  # fmt: skip
        latency = [links[slot].latency_s for slot in teams.tolist()]
        at = np.concatenate([chosen, used_T[teams], [overlap]])
        program.row(at, np.concatenate([volume, latency, [-1.0]]), high=0)
        program.row(np.array([linear, active]), np.array([-1.0, cost.floor_s]), high=0)
        at = np.concatenate([chosen, [active, linear]])
        program.row(at, np.concatenate([cost.linear_s * share, [cost.base_s, -1.0]]), high=0)
        for variable in chosen.tolist():
            program.row(np.array([active, variable]), np.array([1.0, -1.0]), low=0)
        at = np.concatenate([chosen[~local], [overlap, linear, seconds]])
        program.row(at, np.concatenate([attention[~local], [1.0, 1.0, -1.0]]), high=0)

    def placement(self, found: Solution) -> Placement:
        """Return the placement that a solution stands for, without empty micro-batches between."""
        picked = found.value[self.chosen_P] > 0.5
        k_P, group_P, micro_P, slot_P = self.place_P[:, picked]
        draft = Draft(self.length_K.size, self.layout)
        for group in range(self.layout.groups):
            used = np.unique(micro_P[group_P == group])
            for micro, old in enumerate(used.tolist()):
                here = (group_P == group) & (micro_P == old)
                draft.seat(k_P[here], group, micro, slot_P[here])
        return draft.done()
