"""What there is to run on: this machine's cores, memory and disk, or a Ray cluster's resources."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a run may use."""

    where: str
    """In words: `this machine`, or the cluster's address."""
    cpus: float
    """Logical CPUs that Ray hands out."""
    gpus: float
    """GPUs that Ray hands out."""
    memory_bytes: int
    """Memory, of all nodes together."""
    object_store_bytes: int
    """Object stores, of all nodes together."""
    gpu_memory_bytes: int | None = None
    """Memory of one GPU; None where that is not known from here."""
    nodes: int = 1
    """Machines."""


def cores() -> int:
    """Return the cores this process may use: its affinity, or a container's quota if lower."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    count = allowed or os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()[:2]
        if quota != "max":
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def memory() -> tuple[int, int]:
    """Return the bytes of memory in all and still available, a container's limit considered."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        if limit < total:
            total, free = limit, min(free, limit - used)
    return total, free


def disk_free(path: str) -> int | None:
    """Return the free bytes of the disk that `path` lies or will lie on; None for a URL."""
    if "://" in path:
        return None
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def ray_address(address: str | None) -> str | None:
    """Return the cluster to use: the recipe's, else RAY_ADDRESS, else None for a private one."""
    found = address or os.environ.get("RAY_ADDRESS") or None
    return None if found == "local" else found


def resources(address: str | None, object_store_bytes: int | None = None) -> Resources:
    """Return what the cluster at `address` has; without one, what this machine has.

    Raises:
        ClusterError: If there is an address and no cluster answers there within seconds.
    """
    found = ray_address(address)
    if found is not None:
        return _cluster(found)
    import torch

    total, _ = memory()
    # Ray's own default for the store of a private cluster: 30 % of memory.
    return Resources(
        where="this machine",
        cpus=cores(),
        gpus=torch.cuda.device_count(),
        memory_bytes=total,
        object_store_bytes=object_store_bytes or int(0.3 * total),
        gpu_memory_bytes=_gpu_memory(),
    )


def _gpu_memory() -> int | None:
    import torch

    if torch.cuda.device_count() == 0:
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def check_reachable(address: str, timeout_s: float = 5.0) -> None:
    """Raise ClusterError unless something listens at `address` (HOST:PORT or ray://HOST:PORT)."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    advice = "Start one with `ray start --head`, or leave the address out for a private one"
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
            fix=advice,
        ) from None


def _cluster(address: str) -> Resources:
    import ray

    check_reachable(address)
    joined = not ray.is_initialized()
    if joined:
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
            gpu_memory_bytes=_gpu_memory(),
            nodes=sum(key.startswith("node:") and "internal" not in key for key in total),
        )
    finally:
        if joined:
            ray.shutdown()
