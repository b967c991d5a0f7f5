"""Resources that a run may count on: those of its cluster, with nodes that it adds on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from raymix._utils.cluster_nodes import wait_for_nodes
from raymix.errors import ClusterError
from raymix.recipe import ClusterConfig, Recipe
from raymix.training.host.machine import Resources, ray_address, resources
from raymix.training.plan.checks import cluster_problems

# Of one worker, for the size of micro-batches on nodes that are not there yet.
_ASSUMED_WORKER_BYTES = 16 * 10**9


def run_resources(recipe: Recipe) -> Resources:
    """Return the resources of the run's cluster, or of this machine.

    What a cluster lacks that the run waits for is counted as if it were there: see `missing`.

    Raises:
        ClusterError: If there is an address and no cluster answers there within seconds.
    """
    cluster = recipe.cluster
    # Without workers no cluster is used, wherever RAY_ADDRESS points.
    address = cluster.address if cluster.workers else "local"
    available = resources(address, cluster.object_store_bytes)
    if not _waits(cluster) or not cluster_problems(recipe, available):
        return available
    cpus = cluster.workers * cluster.cpus_per_worker
    gpus = cluster.workers if cluster.gpus_per_worker == 1 else 0
    lacks = {"CPUs": cpus - available.cpus, "GPUs": gpus - available.gpus}
    return replace(
        available,
        cpus=max(cpus, available.cpus),
        gpus=max(gpus, available.gpus),
        memory_bytes=max(available.memory_bytes, cluster.workers * _ASSUMED_WORKER_BYTES),
        missing=" and ".join(f"{count:g} {name}" for name, count in lacks.items() if count > 0),
    )


def wait_for_workers(
    cluster: ClusterConfig, per_worker: Mapping[str, float], say: Callable[[str], object]
) -> None:
    """Wait until the joined cluster has nodes for the workers of a run.

    Raises:
        ClusterError: If it has not got them within `cluster.wait_minutes`.
    """
    if not _waits(cluster):
        return
    wanted = cluster.min_workers or cluster.workers
    capacity = wait_for_nodes(wanted, per_worker, minutes=cluster.wait_minutes, say=say)
    if capacity < wanted:
        each = ", ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
        raise ClusterError.at(
            "cluster.workers",
            cluster.workers,
            f"the cluster's nodes can take {capacity} of them, at {each} each, and it added too "
            f"few within {cluster.wait_minutes:g} minutes",
            fix="Use fewer workers, a larger cluster, or raise cluster.wait_minutes",
        )


def _waits(cluster: ClusterConfig) -> bool:
    # A private cluster is this machine, which does not grow.
    own = not cluster.workers or ray_address(cluster.address) is None
    return cluster.wait_minutes > 0 and not own
