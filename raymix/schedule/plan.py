"""A schedule: the sequences, or shards of them, of each rank in each micro-step.

Legend: K sequences, in the order given; M micro-steps, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymix.errors import ScheduleError, format_problem
from raymix.schedule.cost.model import CostModel
from raymix.schedule.cost.timing import Placement, Timing, compute_timing
from raymix.schedule.layout import Ints, Layout


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's shard of one sequence; the shards of all ranks of a CP group have equal size."""

    sequence: int
    """Index in the planned lengths."""
    ranks: tuple[int, ...]
    """The CP group, in order: the ranks that the sequence is sharded over."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The work of one rank in one micro-step; empty where it only keeps the counts equal."""

    micro_step: int
    local: tuple[int, ...]
    """Sequences wholly on the rank, rising."""
    sharded: tuple[Shard, ...]
    """Shards on the rank; all ranks of a CP group list them in the same order."""
    tokens: int
    """Tokens on the rank, including the padding of shards to equal size."""
    seconds: float
    """Estimated time, without waiting for other ranks."""

    @property
    def padding(self) -> bool:
        """Return whether it is empty."""
        return not self.local and not self.sharded


@dataclass(frozen=True, eq=False)
class Schedule:
    """The plan of one global batch.

    All ranks run the same number of micro-steps. A training loop takes `micro_batches(rank)`; the
    loss is divided by the tokens of the global batch.
    """

    planner: str
    layout: Layout
    length_K: Ints
    """The planned lengths, tokens."""
    placement: Placement
    """Micro-step, first rank and number of ranks of each sequence, (K,) each."""
    timing: Timing
    """Tokens and estimated times per micro-step and rank."""

    @classmethod
    def build(
        cls, planner: str, length_K: Ints, placement: Placement, layout: Layout, cost: CostModel
    ) -> Schedule:
        """Return the schedule of a placement, timed by the cost model."""
        timing = compute_timing(length_K, placement, layout, cost)
        return cls(planner, layout, length_K, placement, timing)

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
        """Return the largest number of tokens per micro-step on each rank, shape (R,)."""
        # `initial`: an empty batch has no micro-steps, and numpy refuses the maximum of none.
        return self.timing.tokens_MR.max(axis=0, initial=0)

    def violations(self, cost: CostModel) -> int:
        """Return the number of micro-batches that exceed the memory of a rank."""
        return int((self.timing.tokens_MR > cost.memory_tokens).sum())

    def micro_batches(self, rank: int) -> tuple[MicroBatch, ...]:
        """Return the work of `rank`, one entry per micro-step.

        Raises:
            ScheduleError: If the layout has no such rank.
        """
        if not 0 <= rank < self.layout.ranks:
            raise ScheduleError.at(
                "rank", rank, f"the layout has ranks 0 to {self.layout.ranks - 1}"
            )
        micro_K, first_K, width_K = self._columns()
        sequences = np.flatnonzero((first_K <= rank) & (rank < first_K + width_K))
        local: list[list[int]] = [[] for _ in range(self.micro_steps)]
        sharded: list[list[Shard]] = [[] for _ in range(self.micro_steps)]
        # Rising ids on every rank: the collectives of a CP group match by order.
        for k in sequences.tolist():
            micro, first, width = int(micro_K[k]), int(first_K[k]), int(width_K[k])
            if width == 1:
                local[micro].append(k)
            else:
                sharded[micro].append(Shard(k, tuple(range(first, first + width))))
        tokens, busy = self.timing.tokens_MR[:, rank], self.timing.busy_MR[:, rank]
        return tuple(
            MicroBatch(m, tuple(local[m]), tuple(sharded[m]), int(tokens[m]), float(busy[m]))
            for m in range(self.micro_steps)
        )

    def groups(self, micro_step: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return the sharded sequences of a micro-step by CP group; the same on all ranks."""
        micro_K, first_K, width_K = self._columns()
        sequences_by_ranks: dict[tuple[int, ...], list[int]] = {}
        for k in np.flatnonzero((micro_K == micro_step) & (width_K > 1)).tolist():
            first, width = int(first_K[k]), int(width_K[k])
            sequences_by_ranks.setdefault(tuple(range(first, first + width)), []).append(k)
        return {ranks: tuple(ids) for ranks, ids in sorted(sequences_by_ranks.items())}

    def _columns(self) -> tuple[Ints, Ints, Ints]:
        return self.placement.micro_K, self.placement.first_K, self.placement.width_K

    def check(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> None:
        """Check the invariants of a schedule.

        Raises:
            ScheduleError: If it was made for other lengths or another layout, a sequence is not on
                exactly one slot of the layout, a rank exceeds its memory, or the times differ
                from those of the cost model.
        """
        length_K = np.asarray(lengths, dtype=np.int64)
        if not np.array_equal(length_K, self.length_K) or layout != self.layout:
            raise ScheduleError.at(
                "schedule", self.planner, "made for other lengths or another layout"
            )
        self._check_placement()
        problems = []
        expected = compute_timing(length_K, self.placement, layout, cost)
        if n_overfull := int((expected.tokens_MR > cost.memory_tokens).sum()):
            problems.append(
                format_problem(
                    "schedule.tokens",
                    int(expected.tokens_MR.max()),
                    f"{n_overfull} micro-batches exceed the {cost.memory_tokens} tokens that a "
                    f"rank can hold",
                )
            )
        if not np.array_equal(expected.tokens_MR, self.timing.tokens_MR) or not np.isclose(
            expected.seconds, self.seconds, rtol=1e-9
        ):
            problems.append(
                format_problem(
                    "schedule.seconds",
                    self.seconds,
                    f"the cost model gives {expected.seconds:.6g}, or other tokens per rank",
                )
            )
        if problems:
            raise ScheduleError(*problems)

    def _check_placement(self) -> None:
        """Raise if a sequence has no slot of the layout."""
        micro_K, first_K, width_K = columns = self._columns()
        if {column.shape for column in columns} != {self.length_K.shape}:
            raise ScheduleError.at("schedule", self.planner, "not one slot per sequence")
        # Slots begin at multiples of their width, which also confines them to one group.
        invalid_K = (
            (micro_K < 0)
            | (first_K < 0)
            | ~np.isin(width_K, self.layout.widths)
            | (first_K % width_K != 0)
            | (first_K + width_K > self.layout.ranks)
        )
        if invalid_K.any():
            k = int(invalid_K.argmax())
            slot = (int(micro_K[k]), int(first_K[k]), int(width_K[k]))
            raise ScheduleError.at(f"schedule.placement[{k}]", slot, "not a slot of the layout")

    def document(self) -> dict[str, Any]:
        """Return the schedule in JSON types."""
        return {
            "planner": self.planner,
            "seconds": self.seconds,
            "micro_steps": self.micro_steps,
            "micro_step": self.placement.micro_K.tolist(),
            "first_rank": self.placement.first_K.tolist(),
            "ranks": self.placement.width_K.tolist(),
            "tokens": self.timing.tokens_MR.tolist(),
            "busy_s": self.timing.busy_MR.tolist(),
            "start_s": self.timing.start_MR.tolist(),
        }


def validate_lengths(lengths: ArrayLike, layout: Layout, cost: CostModel) -> Ints:
    """Return the lengths as integers, shape (K,).

    Raises:
        ScheduleError: If they are not a list of whole numbers >= 1, or one is too long for a group.
    """
    array = np.asarray(lengths)
    # An empty list becomes float64 in numpy, so its dtype says nothing.
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        description = f"{array.dtype} of shape {array.shape}"
        raise ScheduleError.at("lengths", description, "not a flat list of whole numbers")
    # Signed: corpora store uint32, where -length (the sort key) would wrap around.
    length_K = array.astype(np.int64)
    if not length_K.size:
        return length_K
    if (shortest := int(length_K.min())) < 1:
        index = int(length_K.argmin())
        raise ScheduleError.at(f"lengths[{index}]", shortest, "a sequence has at least one token")
    capacity = layout.context * cost.memory_tokens
    if (longest := int(length_K.max())) > capacity:
        index = int(length_K.argmax())
        raise ScheduleError.at(
            f"lengths[{index}]",
            longest,
            (
                f"longer than the {layout.context} x {cost.memory_tokens} = {capacity} tokens that "
                "a whole group of ranks can hold; "
                f"{int((length_K > capacity).sum())} of {length_K.size} are"
            ),
            fix="Raise layout.context or cost.memory_tokens, or cut the sequence",
        )
    return length_K
