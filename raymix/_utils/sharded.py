"""Tensors and modules that FSDP2 has sharded, recognized without loading FSDP2.

`torch.distributed.tensor` and `torch.distributed.fsdp` take two seconds to import, which commands
that shard nothing need not pay.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Return whether `value` is a DTensor."""
    return _is_instance(value, "torch.distributed.tensor", "DTensor")


def is_fsdp_module(module: torch.nn.Module) -> bool:
    """Return whether FSDP2 manages the parameters of `module`."""
    return _is_instance(module, "torch.distributed.fsdp", "FSDPModule")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor; a collective if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _is_instance(value: object, module: str, name: str) -> bool:
    # Whoever has made an instance has imported the class; while another thread still imports it,
    # there is none.
    return isinstance(value, getattr(sys.modules.get(module), name, ()))
