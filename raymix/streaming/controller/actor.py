"""The controller as an actor: `MixtureState` with waiting, one per run.

Every call is safe to repeat, as Ray repeats calls when it restarts the actor. None blocks: a call
that must wait (for statistics, for all ranks to say where they are) waits on the event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray

from raymix.mixers import DomainStats, Mixer, MixerContext, build_mixer
from raymix.streaming.controller.journal import Journal
from raymix.streaming.controller.leases import Lease
from raymix.streaming.controller.state import MixtureState

_Answer = TypeVar("_Answer")


class MixtureController:
    """Hands out leases and weights to the ranks of a run.

    Args of the constructor:
        recipe_mixer: The recipe's `mixer` section, or a mixer already built.
        context: What the mixer may know about the run.
        run_dir: Where log and state are kept; without it the controller cannot survive its death.
        snapshot: From `snapshot` in a checkpoint, to continue a run.
        probe_interval: Steps per window.
        lease_s: Seconds of reading that a lease should cover; told to the ranks.
        session: Names this start of the run; with it a restart of this actor under running
            workers is told from a new start in the same directory.
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
        built = isinstance(recipe_mixer, Mixer)
        mixer = recipe_mixer if built else build_mixer(recipe_mixer, context)
        self.lease_s = lease_s
        self.state = MixtureState(
            mixer,
            context,
            kind=getattr(recipe_mixer, "kind", type(mixer).__name__),
            interval=probe_interval,
            journal=Journal(run_dir) if run_dir else None,
            snapshot=snapshot,
            session=session,
        )
        self._changed = asyncio.Event()

    async def register(self, attempt: str, world_size: int) -> tuple[str, float]:
        """Serve a worker group; return the life of this controller and `lease_s`.

        Raises:
            TrainingError: If a later attempt has taken its place.
        """
        life = self.state.register(attempt, world_size)
        self._notify()
        return life, self.lease_s

    async def lease(
        self,
        attempt: str,
        rank: int,
        *,
        step: int,
        held_until: int,
        want: int,
        version: int,
        life: str | None = None,
    ) -> Lease:
        """Return a lease as `MixtureState.lease` does, once there is more to grant.

        Raises:
            TrainingError: If the attempt is over, or knows entries that the controller lost.
        """
        gathered = self.state.gathered
        granted = await self._until(
            lambda: self.state.lease(
                attempt,
                rank,
                step=step,
                held_until=held_until,
                want=want,
                version=version,
                life=life,
            )
        )
        # Waking everybody for every lease would cost the square of the ranks.
        if self.state.gathered != gathered:
            self._notify()
        return granted

    async def push(self, attempt: str, window: int, rank: int, stats: DomainStats) -> None:
        """Take a rank's statistics of a window; repeated and late ones are dropped."""
        if self.state.push(attempt, window, rank, stats):
            self._notify()

    async def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Ask for weights and return the step from which on they hold.

        Raises:
            RecipeError: If they are no shares of the domains, or the step may have been read.
        """
        await self._until(lambda: True if self.state.gathered else None)
        return self.state.set_weights(weights, first_step)

    async def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """Return what a checkpoint needs so that a run can continue at `step`, the one read next.

        Under an adaptive mixer it waits for the statistics of all windows before that of `step`.
        """
        return await self._until(lambda: self.state.snapshot(step))

    async def status(self) -> dict[str, Any]:
        """Return where things stand, in JSON types, for people."""
        return {**self.state.status(), "pid": os.getpid()}

    async def log_lines(self) -> list[str]:
        """Return the mixture log so far, one JSON line per entry."""
        return self.state.log.to_lines()

    async def _until(self, answer: Callable[[], _Answer | None]) -> _Answer:
        while (found := answer()) is None:
            await self._changed.wait()
        return found

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


RemoteMixtureController = ray.remote(MixtureController)
