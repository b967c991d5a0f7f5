"""The same jobs as Ray tasks: one per parameter, on whatever nodes the cluster has.

All nodes must see the models and the output under the same paths (a shared file system). The
workers write their tensors themselves; only journal lines come back.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
import torch

from raymix._utils.private_cluster import start_private
from raymix.errors import MergeError
from raymix.merging.run.jobs import Lines, run_job, scipy_limited
from raymix.merging.run.plan import Plan

# Tasks in flight per core: enough to hide the way to the driver and back.
_AHEAD = 2


def _task(plan: Plan, job: str, folder: str) -> dict[str, Any]:
    """Return the journal's line of one job, done by this worker process on one core."""
    if not os.path.isdir(folder):
        raise MergeError.at(
            "out",
            folder,
            f"node {ray.util.get_node_ip_address()} does not see it",
            fix="Choose a directory on a file system that all nodes share",
        )
    torch.set_num_threads(1)
    with scipy_limited(plan):
        line = run_job(plan, job, folder)
    # Resident memory, mapped inputs among it: the kernel keeps no peak of the rest.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**line, "peak_bytes": most}


def run_on_ray(plan: Plan, jobs: Sequence[str], folder: str, workers: int | None) -> Lines:
    """Yield finished jobs and their lines; joins the running cluster, or starts one here."""
    if not ray.is_initialized():
        _join_or_start()
    gpus = 1 if plan.device == "cuda" else 0
    run = ray.remote(_task).options(num_cpus=1, num_gpus=gpus, max_retries=3)
    shared = ray.put(plan)
    kind = "GPU" if gpus else "CPU"
    most = workers or max(1, int(_AHEAD * ray.cluster_resources().get(kind, 1)))
    waiting, running = deque(jobs), dict[Any, str]()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.popleft()
                running[run.remote(shared, job, folder)] = job
            finished, _ = ray.wait(list(running), num_returns=1)
            for reference in finished:
                job = running.pop(reference)
                yield job, ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, MergeError) else error from None
    finally:
        for reference in running:
            ray.cancel(reference)


def _join_or_start() -> None:
    if os.environ.get("RAY_ADDRESS") == "local":
        start_private()
        return
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        start_private()
