"""Interface between the stream, which knows how far it may read, and the builders of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A rank and the seed of its run."""

    seed: int
    """The run's seed."""
    rank: int
    """This rank."""
    world_size: int
    """Ranks that share each batch."""


# A chunk, and not a step, is the unit of work: numpy calls have a fixed cost, which short steps
# cannot pay one by one.
class Chunk(Protocol):
    """Consecutive steps prepared together."""

    @property
    def first(self) -> int:
        """Return the first step."""
        ...

    @property
    def end(self) -> int:
        """Return the step after the last one."""
        ...

    def batch(self, step: int) -> StepBatch | DocumentBatch:
        """Return the batch of one of the steps."""
        ...

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the planner's state before `step`, one of the steps or the one after them."""
        ...


class BatchBuilder(Protocol):
    """Plans steps in order and builds their batches; the stream limits how far."""

    def load(self, state: Mapping[str, Any]) -> int:
        """Continue from a state and return its step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state before the next step to be planned."""
        ...

    def plan(self, n_steps: int) -> Chunk:
        """Return the next steps, at least one and at most `n_steps`."""
        ...

    def skip(self, n_steps: int) -> int:
        """Advance by at most `n_steps` steps without reading; return by how many."""
        ...
