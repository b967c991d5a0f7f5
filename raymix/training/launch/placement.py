"""Where the workers of a run go: each group that shares sequences on one node, where it fits.

Ray Train reserves one bundle per worker, by one strategy for all, and numbers the workers node by
node. So consecutive workers share a node unless a node gets a number of them that the group's size
does not divide. Where that could happen, bundles are tied to nodes by their labels: then a group
never straddles two nodes, at the price that a node that is lost must come back.

Legend: nodes in the order given, workers in the order of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymix.errors import ClusterError

Strategy = Literal["STRICT_PACK", "PACK"]
NODE_LABEL = "ray.io/node-id"
"""The label by which Ray tells nodes apart."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one node has to give."""

    id: str
    resources: Mapping[str, float]
    """All that workers may take."""


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """What to ask of Ray for the workers of a run."""

    strategy: Strategy
    bundles: tuple[Mapping[str, float], ...]
    """One per worker."""
    selectors: tuple[Mapping[str, str], ...]
    """Labels of the node of each worker; none where the strategy alone is enough."""
    split_groups: bool
    """Whether groups may lie across nodes, as none can hold one."""


def place_workers(
    nodes: Sequence[Node], per_worker: Mapping[str, float], *, group_size: int, groups: int
) -> WorkerPlacement:
    """Return how to place the workers of a run.

    Groups of several workers: all on one node where one has room for all; else each group on one
    node, as many on a node as it holds, the roomiest first; else, where the nodes cannot hold the
    groups whole, packed. Single workers are left to Ray.

    Args:
        nodes: The nodes, with what is free on each.
        per_worker: What one worker needs.
        group_size: Workers that share sequences, consecutive in rank.
        groups: How many such groups there are.

    Raises:
        ClusterError: If all nodes together have no room.
    """
    workers = group_size * groups
    room = [_room(node, per_worker) for node in nodes]
    if sum(room) < workers:
        raise ClusterError.at(
            "cluster.workers",
            workers,
            f"the nodes have room for {sum(room)} of them, at {_words(per_worker)} each",
            fix="Take fewer workers",
        )
    bundles = tuple(dict(per_worker) for _ in range(workers))
    if group_size > 1 and max(room) >= workers:
        return WorkerPlacement("STRICT_PACK", bundles, (), split_groups=False)
    whole = [count // group_size for count in room]
    if sum(whole) < groups:
        return WorkerPlacement("PACK", bundles, (), split_groups=True)
    if group_size == 1 or all(count % group_size == 0 for count in room):
        return WorkerPlacement("PACK", bundles, (), split_groups=False)
    selectors: list[Mapping[str, str]] = []
    left = groups
    for at in sorted(range(len(nodes)), key=lambda at: (-whole[at], at)):
        here = min(left, whole[at])
        selectors += [{NODE_LABEL: nodes[at].id}] * (here * group_size)
        left -= here
    return WorkerPlacement("PACK", bundles, tuple(selectors), split_groups=False)


def alive_nodes() -> list[Node]:
    """Return the nodes of the cluster this process is joined to, with all that they have."""
    import ray

    return [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def placement_options(
    per_worker: Mapping[str, float], *, group_size: int, groups: int
) -> dict[str, Any]:
    """Return what `ray.train.ScalingConfig` is told, for the cluster this process is joined to.

    Nothing where there is no room as yet: nodes may still come, and Ray Train waits for them.
    """
    try:
        return scaling_options(
            place_workers(alive_nodes(), per_worker, group_size=group_size, groups=groups)
        )
    except ClusterError:
        return {}


def scaling_options(places: WorkerPlacement) -> dict[str, Any]:
    """Return what `ray.train.ScalingConfig` is told of it."""
    found: dict[str, Any] = {"placement_strategy": places.strategy}
    if places.selectors:
        found["label_selector"] = [dict(selector) for selector in places.selectors]
    return found


def _room(node: Node, per_worker: Mapping[str, float]) -> int:
    counts = [
        int((node.resources.get(name, 0.0) + 1e-9) // need)
        for name, need in per_worker.items()
        if need > 0
    ]
    return min(counts, default=0)


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
