"""The controller as a stream uses it, and the request for a lease.

Requesting a lease and waiting for it are two calls, so that the answer travels while the rank
works on its last leased step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raymix.streaming.controller.leases import Lease


class Controller(Protocol):
    """The controller as a stream uses it."""

    lease_s: float
    """Seconds of reading that a lease should cover."""
    remote: bool
    """Whether answers take time; then `wait_lease` may be called on another thread."""

    def request_lease(self, *, step: int, leased_until: int, n_steps: int, version: int) -> None:
        """Request a lease; `wait_lease` returns it."""
        ...

    def wait_lease(self) -> Lease:
        """Return the lease last requested, waiting for it."""
        ...


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """A rank's request for a lease; see `Controller.request_lease`."""

    step: int
    leased_until: int
    n_steps: int
    version: int
