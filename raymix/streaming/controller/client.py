"""How a rank talks to the controller: `RemoteController` over Ray, `LocalController` without.

Asking for a lease and taking the answer are two calls, so that the answer travels while the rank
works on its last leased step.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.exceptions

from raymix.errors import ClusterError, RaymixError, TrainingError
from raymix.mixers import DomainStats
from raymix.streaming.actor_options import actor_options
from raymix.streaming.controller.actor import MixtureController, RemoteMixtureController
from raymix.streaming.controller.leases import Lease

# The windows a restarted controller may have lost: the one in work and the two before it.
_KEPT_WINDOWS = 3


class Controller(Protocol):
    """What a stream needs of a controller."""

    lease_s: float
    """Seconds of reading that a lease should cover."""
    remote: bool
    """Whether it is elsewhere: then an answer takes time, and `take` may be called by a thread."""

    def ask(self, *, step: int, held_until: int, want: int, version: int) -> None:
        """Ask for a lease; the answer is had by `take`."""
        ...

    def take(self) -> Lease:
        """Return the answer to the last `ask`, waiting for it."""
        ...


@dataclass(frozen=True, slots=True)
class _Ask:
    step: int
    held_until: int
    want: int
    version: int


class LocalController:
    """A controller in this process, for a single rank; nothing ever waits."""

    remote = False

    def __init__(self, controller: MixtureController) -> None:
        self.lease_s = controller.lease_s
        self._state = controller.state
        self._attempt = uuid.uuid4().hex
        self._state.register(self._attempt, 1)
        self._ask: _Ask | None = None

    def ask(self, *, step: int, held_until: int, want: int, version: int) -> None:
        """Note what is asked; it is answered by `take`, so that later pushes count."""
        self._ask = _Ask(step, held_until, want, version)

    def take(self) -> Lease:
        """Return the lease asked for.

        Raises:
            TrainingError: If it would need statistics that were never pushed.
        """
        assert self._ask is not None
        ask = self._ask
        lease = self._state.lease(
            self._attempt,
            0,
            step=ask.step,
            held_until=ask.held_until,
            want=ask.want,
            version=ask.version,
        )
        if lease is None:
            known = self._state.known_until
            raise TrainingError.at(
                "step",
                ask.step,
                f"its weights need the statistics of steps before {known}, never pushed",
            )
        return lease

    def push(self, window: int, stats: DomainStats) -> None:
        """Hand over the statistics of a window."""
        self._state.push(self._attempt, window, 0, stats)

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Ask for weights and return the step from which on they hold."""
        return self._state.set_weights(weights, first_step)

    def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """Return what a checkpoint needs so that a run can continue at `step`."""
        snapshot = self._state.snapshot(step)
        if snapshot is None:
            raise TrainingError.at("step", step, "statistics of windows before it are missing")
        return snapshot

    def status(self) -> dict[str, Any]:
        """Return where things stand, in JSON types."""
        return self._state.status()


class RemoteController:
    """The controller's actor as one rank sees it.

    Args of the constructor:
        handle: The actor.
        attempt: Names the worker group, the same on all its ranks.
        rank: This rank.
        world_size: Ranks in the group.
        patience_s: How long an answer may take; an adaptive mixer waits for the slowest rank.
    """

    remote = True

    def __init__(
        self,
        handle: Any,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        patience_s: float = 600.0,
    ) -> None:
        self._handle = handle
        self._attempt = attempt
        self._rank = rank
        self._patience_s = patience_s
        self._pushed: dict[int, DomainStats] = {}
        self._ask: _Ask | None = None
        self._answer: Any = None
        self._life, self.lease_s = self._get(handle.register.remote(attempt, world_size))

    def ask(self, *, step: int, held_until: int, want: int, version: int) -> None:
        """Ask for a lease; the answer is had by `take`."""
        self._ask = _Ask(step, held_until, want, version)
        self._send(self._ask)

    def take(self) -> Lease:
        """Return the answer to the last `ask`, waiting for it.

        Raises:
            TrainingError: If another attempt is being served.
            ClusterError: If the controller is gone or does not answer.
        """
        assert self._ask is not None
        ask = self._ask
        lease: Lease = self._get(self._answer)
        entries = lease.entries
        while lease.life != self._life:
            # A new life knows of this rank only what it was just told, and lost the newest pushes.
            self._life = lease.life
            for window, stats in list(self._pushed.items()):
                self._handle.push.remote(self._attempt, window, self._rank, stats)
            version = entries[-1].version if entries else ask.version
            self._send(_Ask(ask.step, ask.held_until, ask.want, version))
            lease = self._get(self._answer)
            entries += lease.entries
        return Lease(lease.until, entries, lease.life)

    def push(self, window: int, stats: DomainStats) -> None:
        """Hand over the statistics of a window; returns at once."""
        self._pushed[window] = stats
        for old in sorted(self._pushed)[:-_KEPT_WINDOWS]:
            del self._pushed[old]
        self._handle.push.remote(self._attempt, window, self._rank, stats)

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Ask for weights and return the step from which on they hold."""
        step: int = self._get(self._handle.set_weights.remote(weights, first_step))
        return step

    def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """Return what a checkpoint needs so that a run can continue at `step`."""
        snapshot: dict[str, Any] = self._get(self._handle.snapshot.remote(step))
        return snapshot

    def status(self) -> dict[str, Any]:
        """Return where things stand, in JSON types."""
        status: dict[str, Any] = self._get(self._handle.status.remote())
        return status

    def _send(self, ask: _Ask) -> None:
        self._answer = self._handle.lease.remote(
            self._attempt,
            self._rank,
            step=ask.step,
            held_until=ask.held_until,
            want=ask.want,
            version=ask.version,
            life=self._life,
        )

    def _get(self, answer: Any) -> Any:
        return get(answer, timeout_s=self._patience_s, what="the mixture controller")


def get(answer: Any, *, timeout_s: float, what: str) -> Any:
    """Return what a Ray call gave, with raymix's errors as they were raised.

    Raises:
        RaymixError: If the call raised one.
        ClusterError: If the actor is gone, or did not answer in time.
    """
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaymixError):
            raise error.cause from None
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError.at(
            "actor", what, f"no answer for {timeout_s:g} s", fix="Look at the other ranks"
        ) from error
    except ray.exceptions.RayActorError as error:
        first = str(error).splitlines()[0]
        raise ClusterError.at("actor", what, f"it is gone ({first})") from error


def start_controller(*, name: str | None = None, **options: Any) -> Any:
    """Return the actor of a new controller on this node, owned by this process.

    Args:
        name: Name to find it by (`ray.get_actor`); none needed where the handle is passed on.
        options: Arguments of `MixtureController`, all but `session`.
    """
    return RemoteMixtureController.options(**actor_options(name, movable=False)).remote(
        session=uuid.uuid4().hex, **options
    )
