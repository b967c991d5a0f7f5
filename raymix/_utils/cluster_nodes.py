"""Nodes of a Ray cluster that grows on demand: asking for them, and waiting until they are up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from raymix._utils.stages import stage

_POLL_S = 1.0
_REMIND_S = 60.0


def node_capacity(resources: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    """Return how many workers of `per_worker` resources each a node's `resources` suffice for."""
    # Resources may be fractions: without the slack, 3 / 0.1 in floats would be 29 workers.
    counts = [
        int((resources.get(name, 0.0) + 1e-9) // need)
        for name, need in per_worker.items()
        if need > 0
    ]
    return min(counts, default=0)


def cluster_capacity(per_worker: Mapping[str, float]) -> int:
    """Return how many workers the nodes of the joined cluster can take, used resources included."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(node_capacity(resources, per_worker) for resources in nodes)


def wait_for_nodes(
    workers: int,
    per_worker: Mapping[str, float],
    *,
    minutes: float,
    say: Callable[[str], object],
) -> int:
    """Wait until the joined cluster has the nodes for some workers, and return how many it has.

    An autoscaler adds nodes for what is asked of Ray and finds no room, and only for that: counting
    the nodes that are there and giving up would leave a cluster without workers as it is. A pending
    placement group asks, and is removed when this returns.

    Args:
        workers: Number of workers.
        per_worker: Resources of one worker, by Ray's names.
        minutes: Limit of the wait; 0 asks for nothing.
        say: Called with lines for the user.
    """
    if (capacity := cluster_capacity(per_worker)) >= workers or not minutes:
        return capacity
    from ray.util.placement_group import placement_group, remove_placement_group

    each = ", ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    stage("waiting for nodes of the cluster")
    start = reminded = time.monotonic()
    group = placement_group([dict(per_worker) for _ in range(workers)], strategy="PACK")
    try:
        say(
            f"the cluster has nodes for {capacity} of {workers} workers at {each} each: asking for "
            f"more, for up to {minutes:g} minutes (cluster.wait_minutes)"
        )
        while capacity < workers and time.monotonic() - start < 60 * minutes:
            time.sleep(_POLL_S)
            capacity = cluster_capacity(per_worker)
            if time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                waited = (reminded - start) / 60
                say(f"nodes for {capacity} of {workers} workers after {waited:.0f} minutes")
    finally:
        remove_placement_group(group)
    return capacity
