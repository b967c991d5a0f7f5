"""Starting or joining Ray for a run, with its output redirected; environments of processes."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from raymix._utils.compat import native
from raymix._utils.private_cluster import start_private
from raymix.errors import ClusterError, ClusterLostError
from raymix.recipe import ClusterConfig
from raymix.training.host.machine import check_reachable, cores, ray_address

# Read by Ray's processes when they start; variables that the user set are kept. By default Ray
# polls rarely and prints much: a health check every 0.5 s notices a dead worker soon, and a worker
# group that gets no resources fails after a minute.
_RAY_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}

# For a private cluster on this machine: its workers run at normal priority, there is no preemption
# to watch for, and nothing collects the metrics and events of Ray's processes, which cost CPU time.
_PRIVATE_CLUSTER_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
}

# Processes that a cluster cannot lose: Ray's names, and names for messages.
_ESSENTIAL_PROCESSES = {"raylet": "node manager (raylet)", "gcs_server": "head (gcs_server)"}

# GNU OpenMP's threads wait for each other by spinning for milliseconds. With more runnable threads
# than cores, as beside Ray's own processes, this slows training down ten times and more.
_OPENMP_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


def thread_environment() -> dict[str, str]:
    """Return the variables to set before torch is imported; those the user set are kept."""
    # An explicit wait policy is the user's decision about spinning.
    if "OMP_WAIT_POLICY" in os.environ:
        return {}
    return {name: os.environ.get(name, value) for name, value in _OPENMP_ENVIRONMENT.items()}


# glibc returns large freed blocks to the system, which maps and zeroes them again in the next step:
# a tenth and more of a step on a CPU. Only its main arena can retain them, and the loop runs in a
# thread that is not the main one, so there must be no other arena. The values are the parameters of
# mallopt(3), for a process that runs already.
_MAX_INT = (1 << 31) - 1
_MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": (native.M_ARENA_MAX, 1),
    "MALLOC_MMAP_THRESHOLD_": (native.M_MMAP_THRESHOLD, _MAX_INT),
    "MALLOC_TRIM_THRESHOLD_": (native.M_TRIM_THRESHOLD, _MAX_INT),
}


def worker_environment(*, on_gpu: bool) -> dict[str, str]:
    """Return the variables that training workers start with; those the user set are kept."""
    # On a GPU tensors are in the memory of torch's own caching allocator.
    if on_gpu:
        return thread_environment()
    malloc = {
        name: os.environ.get(name, str(value)) for name, (_, value) in _MALLOC_SETTINGS.items()
    }
    return thread_environment() | malloc


def keep_freed_memory() -> None:
    """Make this process retain freed memory, as `worker_environment` does for workers.

    Affects only threads that start later. Settings of the user are kept; does nothing with a C
    library other than glibc.
    """
    for name, (parameter, value) in _MALLOC_SETTINGS.items():
        if name not in os.environ:
            native.mallopt(parameter, value)


def apply_malloc_variables() -> None:
    """Apply the MALLOC_ variables of the environment to this process.

    glibc reads them when a program starts, so a fork has those of the process it was forked from.
    """
    for name, (parameter, _) in _MALLOC_SETTINGS.items():
        if os.environ.get(name, "").isdigit():
            native.mallopt(parameter, int(os.environ[name]))


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the recipe's Ray cluster, or start a private one that ends with the context.

    If this process has joined a cluster already, that one is used and left running.

    Raises:
        ClusterError: If no cluster answers at the address.
    """
    # Before `import ray`, which reads some of them.
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    private = ray_address(config.address) is None
    with _temporary_environment(
        _PRIVATE_CLUSTER_ENVIRONMENT if private and not _joined_ray() else {}
    ):
        import ray

        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if ray.is_initialized():
            yield
            return
        if private:
            start_private(
                namespace="raymix", num_cpus=cores(), object_store_memory=config.object_store_bytes
            )
        else:
            _join(config)
        try:
            yield
        finally:
            # Ray prints the repeated messages that it has held back, in whichever thread runs then.
            with _RayFilteredStream.redirect_all():
                ray.shutdown()


def check_private_cluster() -> None:
    """Raise if a private cluster of this process has lost an essential process.

    Does nothing for a cluster that was joined: its processes belong to others.

    Raises:
        ClusterLostError: If one has died; the message names it.
    """
    # Ray itself would end this process some seconds later, without a message.
    from raymix._utils.compat.ray_core import dead_processes

    dead = [kind for kind in dead_processes() if kind in _ESSENTIAL_PROCESSES]
    if dead:
        raise ClusterLostError.at(
            "cluster.address",
            "local",
            f"Ray's {_ESSENTIAL_PROCESSES[dead[0]]} was killed, or crashed",
            allowed="Linux kills processes when memory runs out",
            fix="Run the same command again: it resumes from the last checkpoint",
        )


def _joined_ray() -> bool:
    """Return whether this process has joined a Ray cluster."""
    # Without importing Ray, which takes seconds and reads the environment.
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _temporary_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that the user left unset, and unset them at the end."""
    # Unset again, because a cluster that this process joins later must not inherit them.
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _join(config: ClusterConfig) -> None:
    import ray

    address = ray_address(config.address)
    assert address is not None
    check_reachable(address)
    ray.init(address=address, namespace="raymix", log_to_driver=False, logging_level=logging.ERROR)


def describe_resources() -> str:
    """Return the total and free CPUs and GPUs of the cluster, for messages."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{total[name]:g} {name}s, {free.get(name, 0.0):g} free"
        for name in ("CPU", "GPU")
        if total.get(name)
    ]
    return "; ".join(parts) or "no CPUs"


def capacity_error(workers: int, seconds: float) -> ClusterError:
    """Return the error of workers that got no resources within `seconds`."""
    return ClusterError.at(
        "cluster.workers",
        workers,
        f"they got no resources for {seconds:g} s; the cluster has {describe_resources()}",
        fix="Wait for other work there to end, or use fewer workers",
    )


@contextmanager
def redirect_ray_output(path: Path) -> Iterator[None]:
    """Redirect the output of Ray's own threads to a file: no option of Ray turns it off."""
    original = sys.stdout, sys.stderr
    # Line-buffered, so that the file is complete when the process is killed.
    with path.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout, sys.stderr = (
            cast(TextIO, _RayFilteredStream(stream, file)) for stream in original
        )
        try:
            yield
        finally:
            sys.stdout, sys.stderr = original


class _RayFilteredStream:
    """A stream that passes on the output of all threads but Ray's, which goes to a file."""

    _redirect_all = False

    def __init__(self, stream: TextIO, ray_file: TextIO) -> None:
        self._stream = stream
        self._ray_file = ray_file

    def write(self, text: str) -> int:
        """Write `text` to the stream of the current thread."""
        # Ray's threads have no other mark, and print with plain `print`.
        from_ray = self._redirect_all or threading.current_thread().name.startswith("ray_")
        return (self._ray_file if from_ray else self._stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @classmethod
    @contextmanager
    def redirect_all(cls) -> Iterator[None]:
        """Treat the output of all threads as Ray's."""
        cls._redirect_all = True
        try:
            yield
        finally:
            cls._redirect_all = False
