"""The controller actor: `MixtureState` with waiting, one per run.

Every call is idempotent, as Ray repeats calls when it restarts the actor. None blocks: a call that
must wait (for statistics, or for all ranks to report) waits on the event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray

from raymix.mixers import DomainStats, MixerContext
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.leases import Lease

_Answer = TypeVar("_Answer")


class MixtureController:
    """Grants leases and decides shares for the ranks of a run.

    Args of the constructor:
        recipe_mixer: The recipe's `mixer` section, or a mixer already built.
        context: The run as mixers see it.
        run_dir: Directory of log and state; without it a restarted controller has lost both.
        snapshot: From `snapshot` in a checkpoint, to resume a run.
        probe_interval: Steps per window.
        lease_s: Seconds of reading that a lease should cover; passed on to the ranks.
        session: Id of this start of the run. It distinguishes a restart of this actor under running
            workers from a new start in the same directory.
    """

    def __init__(
        self,
        *,
        recipe_mixer: Any,
        context: MixerContext,
        run_dir: str | None = None,
        snapshot: Mapping[str, Any] | None = None,
        probe_interval: int = 100,
        lease_s: float = 0.05,
        session: str | None = None,
    ) -> None:
        self.lease_s = lease_s
        self.state = build_mixture_state(
            recipe_mixer,
            context,
            run_dir=run_dir,
            snapshot=snapshot,
            probe_interval=probe_interval,
            session=session,
        )
        self._changed = asyncio.Event()

    async def register(self, attempt: str, world_size: int) -> tuple[str, float]:
        """Serve a worker group; return the incarnation of this controller and `lease_s`.

        Raises:
            TrainingError: If a later attempt has replaced it.
        """
        incarnation = self.state.register(attempt, world_size)
        # Calls of the attempt before wait for leases that will not come: wake them to fail.
        self._notify()
        return incarnation, self.lease_s

    async def lease(
        self,
        attempt: str,
        rank: int,
        *,
        step: int,
        leased_until: int,
        n_steps: int,
        version: int,
        incarnation: str | None = None,
    ) -> Lease:
        """Return a lease as `MixtureState.lease` does, once there is more to grant.

        Raises:
            TrainingError: If the attempt is over, or has entries that the controller lost.
        """
        reported = self.state.all_ranks_reported
        lease = await self._until(
            lambda: self.state.lease(
                attempt,
                rank,
                step=step,
                leased_until=leased_until,
                n_steps=n_steps,
                version=version,
                incarnation=incarnation,
            )
        )
        # Waking all waiting calls for each lease would cost the square of the ranks.
        if self.state.all_ranks_reported != reported:
            self._notify()
        return lease

    async def push(self, attempt: str, window: int, rank: int, stats: DomainStats) -> None:
        """Add a rank's statistics of a window; repeated and late ones are dropped."""
        if self.state.push(attempt, window, rank, stats):
            self._notify()

    async def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Request shares and return the step from which on they hold.

        Raises:
            RecipeError: If they are not shares of the domains, or the step may have been read.
        """
        # A restarted controller does not know how far the ranks may read until they report, so it
        # cannot tell the first step that is still free.
        await self._until(lambda: True if self.state.all_ranks_reported else None)
        return self.state.set_weights(weights, first_step)

    async def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """Return the state in a checkpoint that resumes at `step`, the step read next.

        Under an adaptive mixer it waits for the statistics of all windows before that of `step`.
        """
        return await self._until(lambda: self.state.snapshot(step))

    async def status(self) -> dict[str, Any]:
        """Return attempt, leases, shares and windows in JSON types, for people."""
        return {**self.state.status(), "pid": os.getpid()}

    async def log_lines(self) -> list[str]:
        """Return the mixture log so far, one JSON line per entry."""
        return self.state.log.to_lines()

    async def _until(self, attempt: Callable[[], _Answer | None]) -> _Answer:
        # No await between the check and the wait: a change cannot slip in between, as all calls
        # run on one event loop.
        while (answer := attempt()) is None:
            await self._changed.wait()
        return answer

    def _notify(self) -> None:
        # A new event per change: clearing a shared one could hide the change from a waiter that
        # has not run yet.
        self._changed.set()
        self._changed = asyncio.Event()


MixtureControllerActor = ray.remote(MixtureController)
