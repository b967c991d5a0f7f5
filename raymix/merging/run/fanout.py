"""Jobs of a merge as Ray tasks, one per parameter, on any node of the cluster.

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
from raymix.merging.run.plan import MergePlan
from raymix.merging.run.work import JobResults, limit_scipy_threads, run_job

# Two tasks submitted per core: the second hides the round trip to the driver after the first.
_TASKS_PER_CORE = 2
# A task is idempotent (the same bytes at the same offsets), so a lost node costs a retry only.
_MAX_RETRIES = 3
# For tasks under way when a merge ends early. Those that a busy cluster has not begun by then find
# no workspace, or write the same bytes again.
_END_TIMEOUT_S = 60


def _task(plan: MergePlan, job: str, folder: str) -> dict[str, Any]:
    """Return the journal line of one job, run in this worker process on one core."""
    if not os.path.isdir(folder):
        raise MergeError.at(
            "out",
            folder,
            f"node {ray.util.get_node_ip_address()} does not see it",
            fix="Choose a directory on a file system that all nodes share",
        )
    # num_cpus=1 is a reservation; Ray does not limit the threads of a task.
    torch.set_num_threads(1)
    with limit_scipy_threads(plan):
        line = run_job(plan, job, folder)
    # Resident memory, mapped inputs included: the kernel has no peak of anonymous memory alone.
    # ru_maxrss is in KiB on Linux.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**line, "peak_bytes": peak_bytes}


def run_on_ray(
    plan: MergePlan, jobs: Sequence[str], folder: str, workers: int | None
) -> JobResults:
    """Yield finished jobs and their journal lines; joins the running cluster, or starts one."""
    if not ray.is_initialized():
        _join_or_start()
    gpus = 1 if plan.device == "cuda" else 0
    run = ray.remote(_task).options(num_cpus=1, num_gpus=gpus, max_retries=_MAX_RETRIES)
    # Stored once per node; as a plain argument it would be serialized for each task.
    plan_ref = ray.put(plan)
    resource_name = "GPU" if gpus else "CPU"
    n_cores = ray.cluster_resources().get(resource_name, 1)
    max_running = workers or max(1, int(_TASKS_PER_CORE * n_cores))
    waiting, running = deque(jobs), dict[Any, str]()
    try:
        while waiting or running:
            while waiting and len(running) < max_running:
                job = waiting.popleft()
                running[run.remote(plan_ref, job, folder)] = job
            finished, _ = ray.wait(list(running), num_returns=1)
            for reference in finished:
                job = running.pop(reference)
                yield job, ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Users see the MergeError of the task, not Ray's remote traceback around it.
        raise error.cause if isinstance(error.cause, MergeError) else error from None
    finally:
        # They write to the workspace, which the engine may remove next. Not cancelled: `ray.cancel`
        # of a task that is just being sent ends this process (Ray 2.60, `Check failed: it !=
        # submissible_tasks_.end()` in task_manager.cc).
        if running and ray.is_initialized():
            ray.wait(list(running), num_returns=len(running), timeout=_END_TIMEOUT_S)


def _join_or_start() -> None:
    """Connect to the running Ray cluster, or start a private one on this machine."""
    # "local" is Ray's own value for: always a new cluster, even where one runs.
    if os.environ.get("RAY_ADDRESS") == "local":
        start_private()
        return
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        start_private()
