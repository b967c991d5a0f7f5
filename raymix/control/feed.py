"""The seam between the stream, which knows how far it may read, and whatever makes batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from raymix.control.batch import StepBatch


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of which order a rank reads."""

    seed: int
    """The run's seed."""
    rank: int
    """This rank."""
    world_size: int
    """Ranks that share each batch."""


class Feed(Protocol):
    """Plans steps and makes their batches; the stream says how far it may."""

    def load(self, state: Mapping[str, Any]) -> int:
        """Continue from a state and return its step."""
        ...

    def plan(self, n_steps: int) -> int:
        """Make at least one and at most `n_steps` further steps ready; return how many."""
        ...

    def batch(self, step: int) -> StepBatch:
        """Return the batch of a step that is ready."""
        ...

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the planner's state before `step`, the next one or one that is ready."""
        ...
