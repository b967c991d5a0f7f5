"""A controller in the process of the rank, without Ray.

With several ranks, each has a replica: the mixer is deterministic and gets the same statistics in
the same order on all of them, so all write the same mixture log.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raymix.errors import RecipeError, TrainingError
from raymix.mixers import DomainStats
from raymix.streaming.controller.base import LeaseRequest
from raymix.streaming.controller.leases import Lease
from raymix.streaming.controller.state import MixtureState

Gather = Callable[[Any], list[Any]]
"""Returns the values of all ranks in their order; a collective."""


class LocalController:
    """The controller of one rank, in its process; it never waits.

    Args of the constructor:
        state: The state; with several ranks, every rank has one of its own.
        lease_s: Seconds of reading that a lease should cover. With several ranks 0, so that all
            decide about the same steps at the same time.
        world_size: Ranks that share each batch.
        gather: Gathers values over these ranks; needed where there are several, and the mixer is
            adaptive or the weights are changed.
    """

    remote = False

    def __init__(
        self,
        state: MixtureState,
        *,
        lease_s: float = 0.05,
        world_size: int = 1,
        gather: Gather | None = None,
    ) -> None:
        self.lease_s = lease_s
        self._state = state
        self._gather = gather or _alone
        self._attempt = uuid.uuid4().hex
        self._state.register(self._attempt, world_size)
        if world_size > 1:
            # Only one replica sees the files: the others would read other batches than it.
            self._state.refuse_files(
                RecipeError.at(
                    "run",
                    f"{world_size} ranks",
                    "each has a controller of its own, and only that of rank 0 sees files",
                    fix="Call loader.set_weights(...) on all ranks",
                )
            )
        self._request: LeaseRequest | None = None

    def request_lease(self, *, step: int, leased_until: int, n_steps: int, version: int) -> None:
        """Store the request."""
        # Answered in `wait_lease`: statistics pushed between the two calls must count.
        self._request = LeaseRequest(step, leased_until, n_steps, version)

    def wait_lease(self) -> Lease:
        """Return the lease last requested.

        Raises:
            TrainingError: If it depends on statistics that were never pushed.
        """
        assert self._request is not None
        request = self._request
        lease = self._state.lease(
            self._attempt,
            0,
            step=request.step,
            leased_until=request.leased_until,
            n_steps=request.n_steps,
            version=request.version,
        )
        if lease is None:
            known = self._state.known_until
            raise TrainingError.at(
                "step",
                request.step,
                f"its weights need the statistics of steps before {known}, never pushed",
            )
        return lease

    def push(self, window: int, stats: DomainStats) -> None:
        """Push the statistics of a window; a collective of all ranks."""
        for rank, part in enumerate(self._gather(stats)):
            self._state.push(self._attempt, window, rank, part)

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Request shares and return the step from which on they hold; a collective of all ranks.

        Raises:
            RecipeError: If they are not shares of the domains, or the step may have been read.
        """
        if first_step is None:
            # The ranks may have read differently far; the shares must begin at one step for all.
            first_step = max(self._gather(self._state.first_free_step))
        return self._state.set_weights(weights, first_step)

    def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """Return the state in a checkpoint that resumes at `step`."""
        snapshot = self._state.snapshot(step)
        if snapshot is None:
            raise TrainingError.at("step", step, "statistics of windows before it are missing")
        return snapshot

    def status(self) -> dict[str, Any]:
        """Return attempt, leases, shares and windows in JSON types."""
        return self._state.status()


def _alone(value: Any) -> list[Any]:
    return [value]
