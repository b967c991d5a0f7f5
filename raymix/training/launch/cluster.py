"""Starting or joining Ray for a run, without its noise."""

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
from raymix.errors import ClusterError, TrainingError
from raymix.recipe import ClusterConfig
from raymix.training.host.machine import check_reachable, cores, ray_address

# Read by Ray's processes when they start; what the user set stays.
_ENVIRONMENT = {
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


# For a cluster of our own on this machine: training is not to yield the cores to everything else,
# nobody takes the machine away, and nobody reads what Ray's processes would report of themselves.
_PRIVATE = {
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
}

# The processes of a cluster without which it is none, by Ray's names and in words.
_NEEDED = {"raylet": "node manager (raylet)", "gcs_server": "head (gcs_server)"}

# GNU OpenMP's threads wait for each other by spinning for milliseconds, which slows training
# down ten times and more where other processes want the cores too, as Ray's own do.
_SPIN = {"GOMP_SPINCOUNT": "1000"}


def thread_environment() -> dict[str, str]:
    """Return variables that must stand before torch is imported, less those the user set."""
    if "OMP_WAIT_POLICY" in os.environ:
        return {}
    return {name: os.environ.get(name, value) for name, value in _SPIN.items()}


# glibc gives large pieces of freed memory back to the system, to take, map and zero them again in
# the next step: a tenth and more of a step on a CPU. Only its main arena can do otherwise, and the
# loop runs in a thread that is not the main one, so there must be no other arena. With the names of
# the same settings in malloc.h, for a process that runs already.
_MAX_INT = (1 << 31) - 1
_HEAP = {
    "MALLOC_ARENA_MAX": (native.M_ARENA_MAX, 1),
    "MALLOC_MMAP_THRESHOLD_": (native.M_MMAP_THRESHOLD, _MAX_INT),
    "MALLOC_TRIM_THRESHOLD_": (native.M_TRIM_THRESHOLD, _MAX_INT),
}


def worker_environment(*, on_gpu: bool) -> dict[str, str]:
    """Return variables that training workers start with, less those the user set."""
    if on_gpu:
        return thread_environment()
    heap = {name: os.environ.get(name, str(value)) for name, (_, value) in _HEAP.items()}
    return thread_environment() | heap


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, as `worker_environment` has workers do.

    Only threads that start later are served. What the user set stays; elsewhere than in glibc
    nothing happens.
    """
    for name, (parameter, value) in _HEAP.items():
        if name not in os.environ:
            native.mallopt(parameter, value)


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """Be joined to the recipe's Ray cluster, or to a private one that ends with the context.

    A Ray that this process is joined to already is used as it is and left running.

    Raises:
        ClusterError: If no cluster answers at the address.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    private = ray_address(config.address) is None
    with _set_for_now(_PRIVATE if private and not _in_ray() else {}):
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
            with _RayFilteredStream.at_end():
                ray.shutdown()


def check_private_cluster() -> None:
    """Raise where a private cluster of this process has lost what it cannot go on without.

    Ray itself would end this process some seconds later, without a word. Of a cluster that was
    joined nothing is known here.

    Raises:
        TrainingError: That names what died.
    """
    from raymix._utils.compat.ray_core import dead_processes

    dead = [kind for kind in dead_processes() if kind in _NEEDED]
    if dead:
        wrong = f"Ray's {_NEEDED[dead[0]]} was killed, or crashed"
        advice = "A machine that runs out of memory kills. The same command goes on from the last"
        raise TrainingError.at("cluster.address", "local", wrong, fix=f"{advice} checkpoint")


def _in_ray() -> bool:
    """Return whether this process is joined to a Ray, which it does not import to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _set_for_now(variables: Mapping[str, str]) -> Iterator[None]:
    """Set what the user left unset: a Ray that this process starts later is not to inherit it."""
    ours = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _join(config: ClusterConfig) -> None:
    import ray

    address = ray_address(config.address)
    assert address is not None
    check_reachable(address)
    ray.init(address=address, namespace="raymix", log_to_driver=False, logging_level=logging.ERROR)


def describe_resources() -> str:
    """Return in words what the cluster has and what of it is free."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{total[name]:g} {name}s, {free.get(name, 0.0):g} free"
        for name in ("CPU", "GPU")
        if total.get(name)
    ]
    return "; ".join(parts) or "no CPUs"


def capacity_error(workers: int, seconds: float) -> ClusterError:
    """Return the error of workers that found no place within `seconds`."""
    return ClusterError.at(
        "cluster.workers",
        workers,
        f"the cluster gave them no place for {seconds:g} s; it has {describe_resources()}",
        fix="Wait for what else runs there, or take fewer workers",
    )


@contextmanager
def redirect_ray_output(path: Path) -> Iterator[None]:
    """Send what Ray's own threads print to a file: notices that no option turns off."""
    before = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout, sys.stderr = (
            cast(TextIO, _RayFilteredStream(stream, file)) for stream in before
        )
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


class _RayFilteredStream:
    """A stream that passes on everything but what Ray's threads write."""

    _ending = False
    """Whether Ray is being left: what it held back as repeated is printed then, in any thread."""

    def __init__(self, stream: TextIO, notices: TextIO) -> None:
        self._stream = stream
        self._notices = notices

    def write(self, text: str) -> int:
        """Write `text` where the present thread may."""
        ray = self._ending or threading.current_thread().name.startswith("ray_")
        return (self._notices if ray else self._stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @classmethod
    @contextmanager
    def at_end(cls) -> Iterator[None]:
        """Take everything that is printed for Ray's."""
        cls._ending = True
        try:
            yield
        finally:
            cls._ending = False
