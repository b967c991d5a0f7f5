"""Resources of a run: this machine's cores, memory and disk, or those of a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raymix.errors import ClusterError

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
SHM = Path("/dev/shm")
# Of NVIDIA, of AMD, of either below Windows, and of NVIDIA Jetson.
_GPU_DEVICES = tuple(Path("/dev") / name for name in ("nvidiactl", "kfd", "dxg", "nvhost-gpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Resources that a run may use."""

    where: str
    """Text for messages: `this machine`, or the cluster's address."""
    cpus: float
    """Logical CPUs, as Ray counts them."""
    gpus: float
    """GPUs, as Ray counts them."""
    memory_bytes: int
    """Memory of all nodes together."""
    object_store_bytes: int
    """Object stores of all nodes together."""
    gpu_memory_bytes: int | None = None
    """Memory of one GPU; None if unknown on this machine."""
    nodes: int = 1
    """Number of machines."""
    missing: str = ""
    """What of `cpus` and `gpus` is not there yet: the run asks a cluster that grows for it."""


def cores() -> int:
    """Return the cores this process may use: its affinity, or a container's quota if lower."""
    # `os.cpu_count` counts the host's cores, whatever a container or batch system allows.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    count = allowed or os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()[:2]
        # Microseconds of CPU time per period: a quota of half a core still has to be one thread.
        if quota != "max":
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def requested_threads() -> int | None:
    """Return the threads per process that the user set by OMP_NUM_THREADS; None if not set."""
    # Read in the driver: Ray sets the variable in its workers, so there it is not the user's.
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def memory() -> tuple[int, int]:
    """Return the total and the available bytes of memory, within a container's limit."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        if limit < total:
            total, free = limit, min(free, limit - used)
    return total, free


def disk_free(path: str) -> int | None:
    """Return the free bytes of the disk of `path`, which need not exist; None for a URL."""
    if "://" in path:
        return None
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def ray_address(address: str | None) -> str | None:
    """Return the cluster to use: the recipe's, else RAY_ADDRESS, else None for a private one."""
    chosen = address or os.environ.get("RAY_ADDRESS") or None
    return None if chosen == "local" else chosen


def resources(address: str | None, object_store_bytes: int | None = None) -> Resources:
    """Return the resources of the cluster at `address`, or of this machine without one.

    Raises:
        ClusterError: If there is an address and no cluster answers there within seconds.
    """
    cluster = ray_address(address)
    if cluster is not None:
        return _cluster(cluster)
    total, _ = memory()
    gpus, gpu_memory_bytes = _gpus()
    # 30 % of memory is Ray's default for the store of a private cluster.
    return Resources(
        where="this machine",
        cpus=cores(),
        gpus=gpus,
        memory_bytes=total,
        object_store_bytes=object_store_bytes or int(0.3 * total),
        gpu_memory_bytes=gpu_memory_bytes,
    )


def has_gpu_driver() -> bool:
    """Return whether this machine has a driver of GPUs that torch may use."""
    return any(path.exists() for path in _GPU_DEVICES)


def _gpus() -> tuple[int, int | None]:
    """Return the number of GPUs of this machine, and the memory of one."""
    # Imported only where there may be one: torch takes seconds.
    if not has_gpu_driver():
        return 0, None
    import torch

    count = torch.cuda.device_count()
    return count, int(torch.cuda.get_device_properties(0).total_memory) if count else None


def check_reachable(address: str, timeout_s: float = 5.0) -> None:
    """Raise ClusterError unless something listens at `address` (HOST:PORT or ray://HOST:PORT)."""
    # `ray.init` would retry for minutes before it reports that nothing listens.
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise ClusterError.at(
            "cluster.address",
            address,
            "not an address of a Ray cluster",
            allowed="Allowed: HOST:PORT, ray://HOST:PORT, auto, local",
        )
    try:
        socket.create_connection((host, int(port)), timeout_s).close()
    except OSError as error:
        raise ClusterError.at(
            "cluster.address",
            address,
            f"no Ray cluster answers there ({error.strerror or error})",
            fix="Start one with `ray start --head`, or leave the address out for a private one",
        ) from None


def _cluster(address: str) -> Resources:
    import ray

    check_reachable(address)
    # A process that has joined a cluster already stays in it: `ray.shutdown` would end its work.
    joins = not ray.is_initialized()
    if joins:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError.at(
                "cluster.address", address, f"cannot be joined: {str(error).splitlines()[0]}"
            ) from error
    try:
        total = ray.cluster_resources()
        return Resources(
            where=f"the Ray cluster at {address}",
            cpus=total.get("CPU", 0.0),
            gpus=total.get("GPU", 0.0),
            memory_bytes=int(total.get("memory", 0)),
            object_store_bytes=int(total.get("object_store_memory", 0)),
            gpu_memory_bytes=_gpus()[1],
            # Each node has a resource "node:ADDRESS", the head also "node:__internal_head__".
            nodes=sum(key.startswith("node:") and "internal" not in key for key in total),
        )
    finally:
        if joins:
            ray.shutdown()
