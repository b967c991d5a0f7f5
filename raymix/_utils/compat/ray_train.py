"""Private API of Ray Train V2, read in Ray 2.60."""

from __future__ import annotations

from ray.train.torch.config import (
    _set_torch_distributed_env_vars as set_torch_environment,
)
from ray.train.torch.config import (
    _setup_torch_process_group as set_up_process_group,
)
from ray.train.torch.config import _TorchBackend as TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

__all__ = [
    "TorchBackend",
    "WorkerGroupStartupTimeoutError",
    "set_torch_environment",
    "set_up_process_group",
]
# TorchBackend, set_torch_environment, set_up_process_group: the public TorchConfig lets PyTorch's
# store listen on all addresses; a subclass of the backend is the only place to change that.
# WorkerGroupStartupTimeoutError: how Train says that the cluster has no place for the workers; it
# is not exported, and its message alone would have to be parsed.
