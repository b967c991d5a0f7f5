"""The ranks of a job, and the CP groups that may share one sequence.

Legend: G data-parallel groups, N ranks of each, R = G N ranks, T slots of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raymix.errors import ScheduleError, did_you_mean

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Barrier = Literal["group", "all", "none"]
"""The ranks that synchronize after a micro-step: see `Layout.barrier`."""


@dataclass(frozen=True)
class Layout:
    """Data-parallel groups times context-parallel ranks; rank r is number r % context of its group.

    Raises:
        ScheduleError: If a size is not positive, or a width does not divide `context`.
    """

    groups: int
    """Data-parallel groups, G."""
    context: int = 1
    """Ranks of each group, N: a sequence may be sharded over them."""
    barrier: Barrier = field(default="group", kw_only=True)
    """After a micro-step, "group": the ranks of a group wait for each other (the objective of
    Skrull, eq. 8); "all": all ranks wait (parameters gathered per micro-step: FSDP, ZeRO-3);
    "none": only ranks that shared a sequence wait (DDP, ZeRO-2 with delayed reduction)."""
    widths: tuple[int, ...] = field(default=(), kw_only=True)
    """Ranks a sequence may be sharded over; by default 1 (local) and `context` (sharded). The ranks
    first, first + 1, ... of a CP group of w begin at a multiple of w."""

    def __post_init__(self) -> None:
        """Check the sizes and complete the widths."""
        for name in ("groups", "context"):
            value = getattr(self, name)
            # bool is a subclass of int: True would pass as one group.
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ScheduleError.at(f"layout.{name}", value, "not a whole number >= 1")
        if self.barrier not in get_args(Barrier):
            known = get_args(Barrier)
            raise ScheduleError.at(
                "layout.barrier",
                self.barrier,
                "not a barrier",
                allowed=f"Known: {', '.join(known)}",
                fix=did_you_mean(str(self.barrier), known),
            )
        for width in self.widths:
            if width < 1 or self.context % width:
                raise ScheduleError.at(
                    "layout.widths",
                    self.widths,
                    f"{width} does not divide the {self.context} ranks of a group",
                )
        # A frozen dataclass forbids assignment, also in __post_init__.
        object.__setattr__(self, "widths", tuple(sorted({1, *self.widths, self.context})))

    @property
    def ranks(self) -> int:
        """Return the number of ranks, R."""
        return self.groups * self.context

    @cached_property
    def slots(self) -> Slots:
        """Return the slots of a group: the rank sets that may hold one sequence."""
        return Slots.of(self)


@dataclass(frozen=True)
class Slots:
    """The T slots of a group: the N single ranks first, then CP groups by increasing width.

    The last slot is the whole group. Planners index slots by this order.
    """

    first_T: Ints
    """First rank within the group."""
    width_T: Ints
    """Ranks of the slot."""
    level_T: Ints
    """Index of the width in `Layout.widths`."""
    covers_TN: Floats
    """1 where a slot includes a rank, else 0, shape (T, N)."""

    @classmethod
    def of(cls, layout: Layout) -> Slots:
        """Return the slots of a layout's group."""
        n_ranks = layout.context
        slots = [
            (first, width, level)
            for level, width in enumerate(layout.widths)
            for first in range(0, n_ranks, width)
        ]
        first_T, width_T, level_T = np.array(slots, dtype=np.int64).T
        rank_N = np.arange(n_ranks)
        covers = (rank_N >= first_T[:, None]) & (rank_N < (first_T + width_T)[:, None])
        # Floats: numpy has no BLAS product for booleans, and sums over slots are products by it.
        return cls(first_T, width_T, level_T, covers.astype(np.float64))
