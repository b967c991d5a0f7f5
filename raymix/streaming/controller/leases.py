"""Leases: the attempt being served and the steps that each of its ranks may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymix.errors import TrainingError
from raymix.sampling import MixtureEntry


@dataclass(frozen=True, slots=True)
class Lease:
    """Permission for a rank to read steps."""

    until: int
    """Steps below this may be read."""
    entries: tuple[MixtureEntry, ...]
    """Log entries newer than the rank's."""
    incarnation: str
    """Id of the controller's process; another one than before means that it was restarted."""


class Leases:
    """The leases of one worker group, the attempt being served; earlier attempts are rejected.

    Attributes:
        leased_until: By rank, the step below which it may read.
    """

    def __init__(self) -> None:
        self.attempt: str | None = None
        self.world_size = 0
        self.leased_until: dict[int, int] = {}
        self._ended_attempts: set[str] = set()

    @property
    def first_unleased_step(self) -> int:
        """Return the first step that no reported rank may read yet."""
        return max(self.leased_until.values(), default=0)

    @property
    def all_ranks_reported(self) -> bool:
        """Return whether each rank's lease is known."""
        return self.attempt is None or len(self.leased_until) == self.world_size

    def register(self, attempt: str, world_size: int) -> bool:
        """Serve `attempt` from now on; return whether it is a new one.

        Raises:
            TrainingError: If a later attempt has replaced it.
        """
        # All ranks of a group register, and Ray may repeat the call.
        if attempt == self.attempt:
            return False
        # A rank of a replaced group may register late, and must not take the run back.
        if attempt in self._ended_attempts:
            raise _not_served(attempt)
        if self.attempt is not None:
            self._ended_attempts.add(self.attempt)
        self.attempt, self.world_size = attempt, world_size
        self.leased_until = {}
        return True

    def check(self, attempt: str) -> None:
        """Raise TrainingError unless `attempt` is the one being served."""
        if attempt != self.attempt:
            raise _not_served(attempt)

    def state_dict(self) -> dict[str, Any]:
        """Return the attempts, without the leases."""
        # Each rank sends its own lease with each request: a saved copy could only be out of date.
        return {
            "attempt": self.attempt,
            "world_size": self.world_size,
            "past": sorted(self._ended_attempts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Serve the attempt of `state`, whose ranks have yet to report their leases."""
        self.attempt, self.world_size = state["attempt"], state["world_size"]
        self._ended_attempts = set(state["past"])
        self.leased_until = {}


def _not_served(attempt: str) -> TrainingError:
    return TrainingError.at("attempt", attempt, "this worker group is not the one being served")
