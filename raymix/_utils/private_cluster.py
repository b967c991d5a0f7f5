"""A Ray cluster of our own, which nobody but this machine can reach.

Whoever reaches the sockets of Ray's processes can run code in them, and Ray listens on all
addresses of a machine, unless it takes that machine for one that cannot be part of a cluster. A
private cluster is just that, so it is started as Ray starts one there: on the loopback address.
"""

from __future__ import annotations

import logging
from typing import Any

LOOPBACK = "127.0.0.1"


def start_private(**options: Any) -> None:
    """Start and join a Ray cluster whose processes listen on the loopback address only.

    It has no dashboard. Clusters that are joined later are not touched by this.

    Args:
        options: Further ones of `ray.init`.
    """
    import ray

    from raymix._utils.compat.ray_core import single_machine_mode, without_monitors

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # `local`: RAY_ADDRESS may name a cluster that is not wanted.
    settings |= {"address": "local", "include_dashboard": False, **options}
    with single_machine_mode(), without_monitors():
        ray.init(**settings)


def on_loopback() -> bool:
    """Return whether the cluster that this process has joined is on the loopback address only.

    Asked of the nodes: this process may be elsewhere, at the other end of a tunnel.
    """
    import ray

    alive = (node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    return set(alive) == {LOOPBACK}
