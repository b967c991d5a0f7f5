"""Rendezvous of a private cluster's workers, on the loopback address only.

PyTorch's TCPStore listens on all addresses of the first worker's machine, and gloo binds the
address of the host name: both would be reachable from the network. Workers that are all on this
machine need neither, so the store gets a socket on 127.0.0.1, handed to the workers in the way in
which torchrun hands out a store that exists already.
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
# References for the life of the worker's process: a collected store closes its socket.
_stores: list[dist.TCPStore] = []


class LoopbackTorch(TorchConfig):
    """Ray Train's PyTorch configuration for workers that are all on this machine."""

    @property
    def backend_cls(self) -> type[_LoopbackBackend]:
        """Return the class that starts the process group."""
        return _LoopbackBackend


class _LoopbackBackend(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        # In this order: the store must listen before any worker connects to it.
        port = worker_group.execute_single(0, _start_store, backend_config.timeout_s)
        worker_group.execute(_use_store, port)
        worker_group.execute(set_torch_environment)
        size = len(worker_group)
        # Asynchronously: each call blocks until all ranks have joined the group.
        pending = [
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
        ray.get(pending)


def torch_config(backend: str) -> TorchConfig:
    """Return the PyTorch configuration of the joined cluster's workers.

    Args:
        backend: Backend of the process group, such as `gloo`.
    """
    return (LoopbackTorch if on_loopback() else TorchConfig)(backend=backend)


def _start_store(timeout_s: int) -> int:
    """Start the workers' store in this process, and return its port."""
    # Port 0: the kernel chooses a free one, without a race between looking and binding.
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


def _use_store(port: int) -> None:
    """Make this worker's process group use the store; interfaces that the user set are kept."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, _INTERFACE)
    os.environ |= {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # torchrun's sign to its workers that a store exists, so that rank 0 starts none.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
