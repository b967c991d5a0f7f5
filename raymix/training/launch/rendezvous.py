"""Rendezvous of a private cluster's workers, on the loopback address only.

PyTorch's TCPStore listens on all addresses of the first worker's machine, and gloo binds the
address of the host name. Workers that are all on this machine need neither, so the store gets a
socket that listens on 127.0.0.1, the way torchrun hands its workers a store that exists already.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig

from raymix._utils.compat.ray_train import (
    TorchBackend,
    set_torch_environment,
    set_up_process_group,
)
from raymix._utils.private_cluster import LOOPBACK, on_loopback

_INTERFACE = "lo"
# Held for the life of a worker's process.
_stores: list[dist.TCPStore] = []


class LoopbackTorch(TorchConfig):
    """Ray Train's settings of PyTorch, for workers that are all on this machine."""

    @property
    def backend_cls(self) -> type[_LoopbackBackend]:
        """Return what starts the process group."""
        return _LoopbackBackend


class _LoopbackBackend(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        port = worker_group.execute_single(0, _serve, backend_config.timeout_s)
        worker_group.execute(_find, port)
        worker_group.execute(set_torch_environment)
        size = len(worker_group)
        started = [
            worker_group.execute_single_async(
                rank,
                set_up_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=size,
                init_method="env://",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(size)
        ]
        ray.get(started)


def torch_config(backend: str) -> TorchConfig:
    """Return how the workers of the cluster that this process has joined find each other.

    Args:
        backend: Of the process group, such as `gloo`.
    """
    return (LoopbackTorch if on_loopback() else TorchConfig)(backend=backend)


def _serve(timeout_s: int) -> int:
    """Start the store of all workers in this process, and return its port."""
    listener = socket.create_server((LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    _stores.append(store)
    return port


def _find(port: int) -> None:
    """Have this worker's process group use the store there is; what the user set stays."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, _INTERFACE)
    os.environ |= {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # What torchrun says to its workers: the store is there, none of them starts it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
