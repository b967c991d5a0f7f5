"""Who is being served and how far each rank may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymix.errors import TrainingError
from raymix.sampling import MixtureEntry


@dataclass(frozen=True, slots=True)
class Lease:
    """Leave to read on."""

    until: int
    """Steps below this may be read."""
    entries: tuple[MixtureEntry, ...]
    """Log entries newer than the asker's."""
    life: str
    """Names this life of the controller; another one means it was restarted."""


class Leases:
    """The leases of one worker group, the attempt being served; earlier ones are turned away."""

    def __init__(self) -> None:
        self.attempt: str | None = None
        self.world_size = 0
        self.held: dict[int, int] = {}
        self._past: set[str] = set()

    @property
    def horizon(self) -> int:
        """Return the first step that no rank may read yet, as far as is known."""
        return max(self.held.values(), default=0)

    @property
    def gathered(self) -> bool:
        """Return whether it is known how far every rank may read."""
        return self.attempt is None or len(self.held) == self.world_size

    def begin(self, attempt: str, world_size: int) -> bool:
        """Serve `attempt` from now on; return whether it is a new one.

        Raises:
            TrainingError: If a later attempt has taken its place.
        """
        if attempt == self.attempt:
            return False
        if attempt in self._past:
            raise _over(attempt)
        if self.attempt is not None:
            self._past.add(self.attempt)
        self.attempt, self.world_size = attempt, world_size
        self.held = {}
        return True

    def check(self, attempt: str) -> None:
        """Raise TrainingError unless `attempt` is the one being served."""
        if attempt != self.attempt:
            raise _over(attempt)

    def state_dict(self) -> dict[str, Any]:
        """Return who is being served, but not how far: that the ranks themselves know best."""
        return {
            "attempt": self.attempt,
            "world_size": self.world_size,
            "past": sorted(self._past),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Serve the attempt of `state`, whose ranks have yet to say how far they may read."""
        self.attempt, self.world_size = state["attempt"], state["world_size"]
        self._past = set(state["past"])
        self.held = {}


def _over(attempt: str) -> TrainingError:
    return TrainingError.at("attempt", attempt, "this worker group is not the one being served")
