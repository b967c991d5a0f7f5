"""A schedule: which rank holds which sequences, or shards of them, in which micro-step.

Legend: K sequences, in the order they were given; M micro-steps, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymix.errors import ScheduleError, format_problem
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement, Timing, timing
from raymix.schedule.layout import Ints, Layout


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of one sequence: every rank of a team gets one of the same size."""

    sequence: int
    """Position in the lengths planned for."""
    team: tuple[int, ...]
    """The ranks, in order, among which the sequence is divided."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank does in one micro-step; nothing, if it is there to keep counts equal."""

    micro_step: int
    local: tuple[int, ...]
    """Sequences it holds whole, rising."""
    sharded: tuple[Shard, ...]
    """Sequences it shares; all ranks of a team list them in the same order."""
    tokens: int
    """Tokens held, the padding of shards to equal size included."""
    seconds: float
    """Estimated time, waiting for others left out."""

    @property
    def padding(self) -> bool:
        """Return whether it is empty."""
        return not self.local and not self.sharded


@dataclass(frozen=True, eq=False)
class Schedule:
    """The plan of one global batch.

    All ranks go through the same number of micro-steps. A training loop takes
    `micro_batches(rank)`; whoever divides the loss takes the tokens of the whole batch.
    """

    planner: str
    layout: Layout
    length_K: Ints
    """What was planned for."""
    placed: Placement
    """Micro-step, first rank and number of ranks of each sequence, (K,) each."""
    timing: Timing
    """Tokens and estimated times per micro-step and rank."""

    @classmethod
    def build(
        cls, planner: str, length_K: Ints, placed: Placement, layout: Layout, cost: CostModel
    ) -> Schedule:
        """Return the schedule that a placement describes, timed by the cost model."""
        return cls(planner, layout, length_K, placed, timing(length_K, placed, layout, cost))

    @property
    def micro_steps(self) -> int:
        """Return M, the same for every rank."""
        return self.timing.busy_MR.shape[0]

    @property
    def seconds(self) -> float:
        """Return the estimated time of the step."""
        return self.timing.seconds

    @cached_property
    def memory_R(self) -> Ints:
        """Return the most tokens each rank holds in a micro-step, shape (R,)."""
        return self.timing.tokens_MR.max(axis=0, initial=0)

    def violations(self, cost: CostModel) -> int:
        """Return in how many micro-steps and ranks more tokens are held than there is room for."""
        return int((self.timing.tokens_MR > cost.memory_tokens).sum())

    def micro_batches(self, rank: int) -> tuple[MicroBatch, ...]:
        """Return what `rank` does, one entry per micro-step.

        Raises:
            ScheduleError: If the layout has no such rank.
        """
        if not 0 <= rank < self.layout.ranks:
            raise ScheduleError.at(
                "rank", rank, f"the layout has ranks 0 to {self.layout.ranks - 1}"
            )
        at = self.placed
        mine = np.flatnonzero((at.first_K <= rank) & (rank < at.first_K + at.width_K))
        local: list[list[int]] = [[] for _ in range(self.micro_steps)]
        sharded: list[list[Shard]] = [[] for _ in range(self.micro_steps)]
        for k in mine.tolist():
            micro, first, width = int(at.micro_K[k]), int(at.first_K[k]), int(at.width_K[k])
            if width == 1:
                local[micro].append(k)
            else:
                sharded[micro].append(Shard(k, tuple(range(first, first + width))))
        tokens, busy = self.timing.tokens_MR[:, rank], self.timing.busy_MR[:, rank]
        return tuple(
            MicroBatch(m, tuple(local[m]), tuple(sharded[m]), int(tokens[m]), float(busy[m]))
            for m in range(self.micro_steps)
        )

    def teams(self, micro_step: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return the sequences sharded in a micro-step by team; all ranks ask the same of it."""
        at = self.placed
        found: dict[tuple[int, ...], list[int]] = {}
        for k in np.flatnonzero((at.micro_K == micro_step) & (at.width_K > 1)).tolist():
            first, width = int(at.first_K[k]), int(at.width_K[k])
            found.setdefault(tuple(range(first, first + width)), []).append(k)
        return {team: tuple(ids) for team, ids in sorted(found.items())}

    def check(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> None:
        """Check every law of a schedule.

        Raises:
            ScheduleError: If it is of other lengths or another layout, a sequence is not on
                exactly one team of an allowed width inside one group, a rank holds more than
                its memory, or the times are not those of the cost model.
        """
        length_K = np.asarray(lengths, dtype=np.int64)
        faults = []
        if not np.array_equal(length_K, self.length_K) or layout != self.layout:
            faults.append(
                format_problem("schedule", self.planner, "made for other lengths or a layout")
            )
            raise ScheduleError(*faults)
        at = self.placed
        if {x.shape for x in (at.micro_K, at.first_K, at.width_K)} != {length_K.shape}:
            raise ScheduleError.at("schedule", self.planner, "not one place per sequence")
        wrong_K = (
            (at.micro_K < 0)
            | (at.first_K < 0)
            | ~np.isin(at.width_K, layout.widths)
            | (at.first_K % at.width_K != 0)
            | (at.first_K + at.width_K > layout.ranks)
        )
        if wrong_K.any():
            k = int(wrong_K.argmax())
            where = (int(at.micro_K[k]), int(at.first_K[k]), int(at.width_K[k]))
            raise ScheduleError.at(f"schedule.placed[{k}]", where, "no place of the layout")
        again = timing(length_K, at, layout, cost)
        if over := int((again.tokens_MR > cost.memory_tokens).sum()):
            most = int(again.tokens_MR.max())
            faults.append(
                format_problem(
                    "schedule.tokens",
                    most,
                    f"{over} micro-batches over the {cost.memory_tokens} tokens that a rank "
                    f"can hold",
                )
            )
        if not np.array_equal(again.tokens_MR, self.timing.tokens_MR) or not np.isclose(
            again.seconds, self.seconds, rtol=1e-9
        ):
            faults.append(
                format_problem(
                    "schedule.seconds",
                    self.seconds,
                    f"the cost model says {again.seconds:.6g}, or other tokens per rank",
                )
            )
        if faults:
            raise ScheduleError(*faults)

    def document(self) -> dict[str, Any]:
        """Return the schedule in JSON types."""
        return {
            "planner": self.planner,
            "seconds": self.seconds,
            "micro_steps": self.micro_steps,
            "micro_step": self.placed.micro_K.tolist(),
            "first_rank": self.placed.first_K.tolist(),
            "ranks": self.placed.width_K.tolist(),
            "tokens": self.timing.tokens_MR.tolist(),
            "busy_s": self.timing.busy_MR.tolist(),
            "start_s": self.timing.start_MR.tolist(),
        }


def checked_lengths(lengths: ArrayLike, layout: Layout, cost: CostModel) -> Ints:
    """Return the lengths as integers, shape (K,).

    Raises:
        ScheduleError: If they are no list of whole numbers >= 1, or one is too long for a group.
    """
    given = np.asarray(lengths)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        shown = f"{given.dtype} of shape {given.shape}"
        raise ScheduleError.at("lengths", shown, "not a flat list of whole numbers")
    length_K = given.astype(np.int64)
    if not length_K.size:
        return length_K
    if (short := int(length_K.min())) < 1:
        at = int(length_K.argmin())
        raise ScheduleError.at(f"lengths[{at}]", short, "a sequence has at least one token")
    room = layout.context * cost.memory_tokens
    if (longest := int(length_K.max())) > room:
        at = int(length_K.argmax())
        raise ScheduleError.at(
            f"lengths[{at}]",
            longest,
            (
                f"longer than the {layout.context} x {cost.memory_tokens} = {room} tokens that "
                "a whole group of ranks can hold; "
                f"{int((length_K > room).sum())} of {length_K.size} are"
            ),
            fix="Raise layout.context or cost.memory_tokens, or cut the sequence",
        )
    return length_K
