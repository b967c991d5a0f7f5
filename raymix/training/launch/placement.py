"""Placement of a run's workers: each context-parallel group on one node, if it fits.

Ray Train reserves one bundle per worker, by one strategy for all, and numbers the workers node by
node. So consecutive workers share a node unless a node gets a number of them that the group size
does not divide. Where that could happen, bundles are bound to nodes by label selectors. Then no
group is split, but the run cannot move: a lost node must come back.

Legend: nodes in the order given, workers in the order of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymix._utils.cluster_nodes import node_capacity
from raymix.errors import ClusterError
from raymix.recipe import ClusterConfig

Strategy = Literal["STRICT_PACK", "PACK"]
NODE_LABEL = "ray.io/node-id"
"""Ray's label with the id of a node."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster."""

    id: str
    resources: Mapping[str, float]
    """Resources for workers, by Ray's names."""


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """Resource bundles of a run's workers and how Ray places them."""

    strategy: Strategy
    bundles: tuple[Mapping[str, float], ...]
    """One per worker."""
    selectors: tuple[Mapping[str, str], ...]
    """Label selector of each worker's node; empty if the strategy alone is enough."""
    split_groups: bool
    """Whether groups may span nodes, because no placement avoids it."""


def place_workers(
    nodes: Sequence[Node], per_worker: Mapping[str, float], *, group_size: int, groups: int
) -> WorkerPlacement:
    """Return the placement of a run's workers.

    Groups of several workers: all groups on one node if one has the capacity; else each group on
    one node, filling the largest nodes first; else, if the nodes cannot take all groups unsplit,
    packed. Single workers are left to Ray.

    Args:
        nodes: The nodes, with their resources.
        per_worker: Resources of one worker.
        group_size: Workers of a context-parallel group, consecutive in rank.
        groups: Number of groups.

    Raises:
        ClusterError: If all nodes together have too little capacity.
    """
    workers = group_size * groups
    # Workers that each node can take.
    capacity = [node_capacity(node.resources, per_worker) for node in nodes]
    if sum(capacity) < workers:
        raise ClusterError.at(
            "cluster.workers",
            workers,
            f"the nodes can take {sum(capacity)} of them, at {_describe(per_worker)} each",
            fix="Use fewer workers",
        )
    bundles = tuple(dict(per_worker) for _ in range(workers))
    if group_size > 1 and max(capacity) >= workers:
        return WorkerPlacement("STRICT_PACK", bundles, (), split_groups=False)
    groups_per_node = [count // group_size for count in capacity]
    if sum(groups_per_node) < groups:
        return WorkerPlacement("PACK", bundles, (), split_groups=True)
    # PACK fills node after node. If the group size divides every node's capacity, no group is split
    # and the run may still move to other nodes.
    if group_size == 1 or all(count % group_size == 0 for count in capacity):
        return WorkerPlacement("PACK", bundles, (), split_groups=False)
    selectors: list[Mapping[str, str]] = []
    remaining = groups
    # Largest first, so the run takes as few nodes as possible; ties in the given order.
    for node in sorted(range(len(nodes)), key=lambda node: (-groups_per_node[node], node)):
        placed = min(remaining, groups_per_node[node])
        selectors += [{NODE_LABEL: nodes[node].id}] * (placed * group_size)
        remaining -= placed
    return WorkerPlacement("PACK", bundles, tuple(selectors), split_groups=False)


def worker_resources(cluster: ClusterConfig, *, on_gpu: bool) -> dict[str, float]:
    """Return the resources of one worker, by Ray's names."""
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if on_gpu else {})}


def alive_nodes() -> list[Node]:
    """Return the nodes of the joined cluster with all their resources, used ones included."""
    # Total and not free: Ray Train queues for resources that other work frees later.
    import ray

    return [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def placement_options(
    per_worker: Mapping[str, float], *, group_size: int, groups: int
) -> dict[str, Any]:
    """Return the placement arguments of `ray.train.ScalingConfig`, for the joined cluster."""
    # Too little capacity is no error yet: an autoscaler may add nodes, for which Ray Train waits.
    try:
        return scaling_options(
            place_workers(alive_nodes(), per_worker, group_size=group_size, groups=groups)
        )
    except ClusterError:
        return {}


def scaling_options(placement: WorkerPlacement) -> dict[str, Any]:
    """Return the placement arguments of `ray.train.ScalingConfig`."""
    options: dict[str, Any] = {"placement_strategy": placement.strategy}
    if placement.selectors:
        options["label_selector"] = [dict(selector) for selector in placement.selectors]
    return options


def _describe(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
