"""The ranks' side of the controller actor."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

from raymix.errors import ClusterLostError, RaymixError
from raymix.mixers import DomainStats
from raymix.streaming.actors import start_actor
from raymix.streaming.controller.actor import MixtureControllerActor
from raymix.streaming.controller.base import LeaseRequest
from raymix.streaming.controller.leases import Lease

# A restarted controller may have lost the pushes of the current window and of the two before it,
# no more: leases end two windows after the last complete one, which is saved.
_RESEND_WINDOWS = 3


class RemoteController:
    """The controller actor, seen from one rank.

    Args of the constructor:
        handle: The actor.
        attempt: Id of the worker group, the same on all its ranks.
        rank: This rank.
        world_size: Ranks in the group.
        timeout_s: Time limit of an answer; an adaptive mixer waits for the slowest rank.
    """

    remote = True

    def __init__(
        self,
        handle: Any,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        timeout_s: float = 600.0,
    ) -> None:
        self._handle = handle
        self._attempt = attempt
        self._rank = rank
        self._timeout_s = timeout_s
        self._pushed: dict[int, DomainStats] = {}
        self._request: LeaseRequest | None = None
        self._answer: Any = None
        self._incarnation, self.lease_s = self._get(handle.register.remote(attempt, world_size))

    def request_lease(self, *, step: int, leased_until: int, n_steps: int, version: int) -> None:
        """Request a lease; `wait_lease` returns it."""
        self._request = LeaseRequest(step, leased_until, n_steps, version)
        self._send(self._request)

    def wait_lease(self) -> Lease:
        """Return the lease last requested, waiting for it.

        Raises:
            TrainingError: If another attempt is being served.
            ClusterLostError: If the controller is gone or does not answer.
        """
        assert self._request is not None
        request = self._request
        lease: Lease = self._get(self._answer)
        entries = lease.entries
        # A loop, as the controller may restart again while this rank catches up with it.
        while lease.incarnation != self._incarnation:
            # A new incarnation knows of this rank only the request just sent, and has lost the
            # newest pushes. Whichever call runs first, the lease waits for the pushes.
            self._incarnation = lease.incarnation
            for window, stats in list(self._pushed.items()):
                self._handle.push.remote(self._attempt, window, self._rank, stats)
            version = entries[-1].version if entries else request.version
            self._send(LeaseRequest(request.step, request.leased_until, request.n_steps, version))
            lease = self._get(self._answer)
            entries += lease.entries
        return Lease(lease.until, entries, lease.incarnation)

    def push(self, window: int, stats: DomainStats) -> None:
        """Push the statistics of a window; returns at once."""
        self._pushed[window] = stats
        for old in sorted(self._pushed)[:-_RESEND_WINDOWS]:
            del self._pushed[old]
        self._handle.push.remote(self._attempt, window, self._rank, stats)

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float], first_step: int | None = None
    ) -> int:
        """Request shares and return the step from which on they hold."""
        step: int = self._get(self._handle.set_weights.remote(weights, first_step))
        return step

    def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """Return the state in a checkpoint that resumes at `step`."""
        snapshot: dict[str, Any] = self._get(self._handle.snapshot.remote(step))
        return snapshot

    def status(self) -> dict[str, Any]:
        """Return attempt, leases, shares and windows in JSON types."""
        status: dict[str, Any] = self._get(self._handle.status.remote())
        return status

    def _send(self, request: LeaseRequest) -> None:
        self._answer = self._handle.lease.remote(
            self._attempt,
            self._rank,
            step=request.step,
            leased_until=request.leased_until,
            n_steps=request.n_steps,
            version=request.version,
            incarnation=self._incarnation,
        )

    def _get(self, answer: Any) -> Any:
        return get_result(answer, timeout_s=self._timeout_s, actor="the mixture controller")


def get_result(answer: Any, *, timeout_s: float, actor: str) -> Any:
    """Return the result of a Ray call, with raymix's own errors unwrapped.

    Args:
        answer: Reference that the call returned.
        timeout_s: Time limit, seconds.
        actor: Name of the actor in error messages.

    Raises:
        RaymixError: If the call raised one.
        ClusterLostError: If the actor is gone, or did not answer in time.
    """
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        # Ray wraps what a method raised; users see raymix's errors without its remote traceback.
        if isinstance(error.cause, RaymixError):
            raise error.cause from None
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterLostError.at(
            "actor", actor, f"no answer for {timeout_s:g} s", fix="Look at the other ranks"
        ) from error
    except ray.exceptions.RayActorError as error:
        first_line = str(error).splitlines()[0]
        raise ClusterLostError.at("actor", actor, f"it is gone ({first_line})") from error


def start_controller(*, name: str | None = None, **options: Any) -> Any:
    """Return the actor of a new controller on this node, owned by this process.

    Args:
        name: Name for `ray.get_actor`; none needed where the handle is passed on.
        options: Arguments of `MixtureController`, all but `session`.
    """
    # Not movable: its journal is in the run directory, a local one of this node.
    arguments = {"session": uuid.uuid4().hex, **options}
    return start_actor(MixtureControllerActor, name, movable=False, arguments=arguments)
