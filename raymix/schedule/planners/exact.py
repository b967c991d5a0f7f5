"""`milp`: the optimal schedule of a small batch, by an integer program.

The problem of Skrull's eq. (8) to (11) with the cost model and all slots of the layout: the group,
micro-batch and slot of each sequence that minimize the time of the slowest group. Optimal, unless
the node limit is reached first, among schedules of at most one micro-batch more than memory needs.
Groups, micro-batches and ranks are interchangeable, so the i-th longest sequence may be confined to
the first i of each; without that, proofs of optimality take far longer.

Legend: K sequences, G groups, M micro-batches of a group, T slots, N ranks of a group, P choices: a
choice is one sequence in one slot of one micro-batch of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raymix.errors import ScheduleError
from raymix.schedule.base import planner
from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.cost.timing import Placement
from raymix.schedule.group import PlacementBuilder
from raymix.schedule.layout import Ints, Layout
from raymix.schedule.planners.integer_program import IntegerProgram, Solution

MAX_CHOICES = 6_000
"""Largest number of choices (binary variables) of a program that is solved."""
_RELATIVE_GAP, _MAX_NODES = 1e-4, 20_000


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """The best placement with a lower bound of all others."""

    placement: Placement
    seconds: float
    """Time by the cost model."""
    bound: float
    """Lower bound in seconds of all placements in as many micro-batches."""


@planner("milp")
def milp(length_K: Ints, layout: Layout, cost: CostModel) -> Placement:
    """Return the best placement."""
    return solve_exact(length_K, layout, cost).placement


def solve_exact(
    length_K: Ints,
    layout: Layout,
    cost: CostModel,
    *,
    gap: float = _RELATIVE_GAP,
    nodes: int = _MAX_NODES,
) -> ExactPlan:
    """Return the best placement of sequences, longest first, and a bound of all others.

    A barrier of "none" is treated as "group": the times are then upper bounds.

    Args:
        length_K: Tokens, longest first, shape (K,).
        layout: The ranks.
        cost: Times and memory.
        gap: Relative gap between time and bound at which the search ends.
        nodes: Nodes of the branch-and-bound tree at which the search ends.

    Raises:
        ScheduleError: If the batch is too large, or the search ends without a placement.
    """
    tokens = int(length_K.sum())
    max_micro = max(1, -(-tokens // (cost.memory_tokens * layout.ranks))) + 1
    # More micro-batches only where these are infeasible: padding and whole sequences need room.
    while max_micro <= length_K.size + 1:
        model = _ScheduleProgram(length_K, layout, cost, min(max_micro, length_K.size))
        solution = model.program.solve(gap=gap, max_nodes=nodes)
        if solution is not None:
            return ExactPlan(model.placement(solution), solution.objective, solution.bound)
        max_micro += 1
    raise ScheduleError.at(
        "lengths", length_K.size, f"no placement found in {nodes} nodes", fix="Use planner='refine'"
    )


class _ScheduleProgram:
    """The integer program of one batch, and the choice that each binary variable stands for."""

    def __init__(self, length_K: Ints, layout: Layout, cost: CostModel, n_micro: int) -> None:
        self.layout = layout
        self.cost = cost
        self.length_K = length_K
        self.program = IntegerProgram()
        slots = layout.slots
        self._tokens_KT = shard_tokens(length_K[:, None], slots.width_T)
        self._attention_KT = cost.attention(length_K[:, None], slots.width_T)
        choices = [
            (k, group, micro, slot)
            for k in range(length_K.size)
            # Symmetry breaking: the k-th longest is in one of the first k + 1 groups, and so on.
            for group in range(min(layout.groups, k + 1))
            for micro in range(min(n_micro, k + 1))
            for slot in self._allowed_slots(k)
        ]
        if len(choices) > MAX_CHOICES:
            raise ScheduleError.at(
                "lengths",
                f"{length_K.size} lengths",
                f"{len(choices)} choices for an exact plan, at most {MAX_CHOICES} are tried",
                fix="Plan fewer sequences, or use planner='refine'",
            )
        self.choice_P = np.array(choices, dtype=np.int64).T
        self.chosen_P = self.program.add_variables(len(choices), upper=1, integer=True)
        self._choose_once()
        self._constrain_times(n_micro)

    def _allowed_slots(self, k: int) -> Iterator[int]:
        """Yield the slots of a sequence that hold it; by symmetry, the first ones for the longest.

        k sequences, each on the widest slot below the whole group, cover k * widest ranks.
        """
        slots, widths = self.layout.slots, self.layout.widths
        widest = widths[-2] if len(widths) > 1 else 1
        for slot, first in enumerate(slots.first_T.tolist()):
            if first <= k * widest and self._tokens_KT[k, slot] <= self.cost.memory_tokens:
                yield slot

    def _choose_once(self) -> None:
        """Require exactly one choice per sequence."""
        for k in range(self.length_K.size):
            self.program.add_constraint(self.chosen_P[self.choice_P[0] == k], 1.0, low=1, high=1)

    def _constrain_times(self, n_micro: int) -> None:
        """Require the objective to be at least the time of every group."""
        program, layout = self.program, self.layout
        (total,) = program.add_variables(1, cost=1.0)
        second_GM = program.add_variables(layout.groups * n_micro).reshape(layout.groups, n_micro)
        if layout.barrier == "all":
            # All groups share the variables: a micro-step ends for all with the slowest rank.
            second_GM[1:] = second_GM[0]
        for group in range(layout.groups):
            index = np.append(second_GM[group], total)
            program.add_constraint(index, np.append(np.ones(n_micro), -1.0), high=0)
            for micro in range(n_micro):
                self._constrain_micro_batch(group, micro, int(second_GM[group, micro]))

    def _constrain_micro_batch(self, group: int, micro: int, seconds: int) -> None:
        """Constrain the variable `seconds` by every rank of a micro-batch."""
        _, group_P, micro_P, slot_P = self.choice_P
        choices = np.flatnonzero((group_P == group) & (micro_P == micro))
        slots, n_ranks = self.layout.slots, self.layout.context
        # Continuous, yet 0 or 1 in a solution: the latency pushes it down, binaries push it up.
        used_T = self.program.add_variables(slots.width_T.size, upper=1)
        for choice in choices[slot_P[choices] >= n_ranks].tolist():
            index = np.array([used_T[slot_P[choice]], self.chosen_P[choice]])
            self.program.add_constraint(index, np.array([1.0, -1.0]), low=0)
        for rank in range(n_ranks):
            on_rank = choices[slots.covers_TN[slot_P[choices], rank] > 0]
            if on_rank.size:
                self._constrain_rank(rank, on_rank, used_T, seconds)

    def _constrain_rank(self, rank: int, choices: Ints, used_T: Ints, seconds: int) -> None:
        """Constrain one rank of a micro-batch: memory, and eq. (1) of `cost.model` by terms."""
        program, cost, slots = self.program, self.cost, self.layout.slots
        k_P, slot_P = self.choice_P[0, choices], self.choice_P[3, choices]
        chosen = self.chosen_P[choices]
        tokens, attention = self._tokens_KT[k_P, slot_P], self._attention_KT[k_P, slot_P]
        local = slot_P < self.layout.context
        # overlap = max(gather, local attention), by a constraint for each; linear likewise.
        overlap, linear, active = program.add_variables(3, upper=np.array([np.inf, np.inf, 1]))
        program.add_constraint(chosen, tokens, high=cost.memory_tokens)
        program.add_constraint(
            np.append(chosen[local], overlap), np.append(attention[local], -1.0), high=0
        )
        # The first slot that covers a rank is the rank itself, which gathers nothing.
        cp_slots = np.flatnonzero(slots.covers_TN[:, rank])[1:]
        links = {slot: cost.link(int(slots.width_T[slot])) for slot in cp_slots.tolist()}
        volume = [
            links[slot].token_s * self.length_K[k] if slot in links else 0.0
            for k, slot in zip(k_P.tolist(), slot_P.tolist(), strict=True)
        ]
        latency = [links[slot].latency_s for slot in cp_slots.tolist()]
        index = np.concatenate([chosen, used_T[cp_slots], [overlap]])
        program.add_constraint(index, np.concatenate([volume, latency, [-1.0]]), high=0)
        # `active` is 1 on a rank with tokens: a rank without any pays neither floor nor base.
        program.add_constraint(np.array([linear, active]), np.array([-1.0, cost.floor_s]), high=0)
        index = np.concatenate([chosen, [active, linear]])
        row = np.concatenate([cost.linear_s * tokens, [cost.base_s, -1.0]])
        program.add_constraint(index, row, high=0)
        for variable in chosen.tolist():
            program.add_constraint(np.array([active, variable]), np.array([1.0, -1.0]), low=0)
        index = np.concatenate([chosen[~local], [overlap, linear, seconds]])
        row = np.concatenate([attention[~local], [1.0, 1.0, -1.0]])
        program.add_constraint(index, row, high=0)

    def placement(self, solution: Solution) -> Placement:
        """Return the placement of a solution, without empty micro-batches in between."""
        # The solver returns binaries within a tolerance of 0 and 1.
        chosen = solution.value[self.chosen_P] > 0.5
        k_P, group_P, micro_P, slot_P = self.choice_P[:, chosen]
        builder = PlacementBuilder(self.length_K.size, self.layout)
        for group in range(self.layout.groups):
            nonempty = np.unique(micro_P[group_P == group])
            for micro, old_micro in enumerate(nonempty.tolist()):
                selected = (group_P == group) & (micro_P == old_micro)
                builder.place(k_P[selected], group, micro, slot_P[selected])
        return builder.build()
