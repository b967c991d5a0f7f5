"""Guards against numbers that are not finite: gradients, weights, optimizer states.

One bad batch can give a gradient that is not finite; an update with it would ruin every weight, and
the next checkpoint would keep them. So such an update is left out, and tensors are looked through
before they are saved and after they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raymix._utils.compat.torch import step_unless
from raymix._utils.sharded import is_sharded
from raymix.training.model.parallel import PendingSum, World


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
    """Take an optimizer step, unless the gradient is not finite: then nothing changes.

    Args:
        optimizer: The optimizer.
        grad_norm: Global norm of the gradient, a scalar on the device. It is equal on all ranks, so
            all of them take the step or none does.
    """
    finite = torch.isfinite(grad_norm)
    # The fused kernel decides on the device; for the others the host must wait for the norm.
    if _is_fused(optimizer):
        step_unless(optimizer, ~finite)
    elif finite:
        optimizer.step()


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    # Not of subclasses: what they do around the kernel is theirs.
    return type(optimizer) is torch.optim.AdamW and all(
        group["fused"] and not any(is_sharded(parameter) for parameter in group["params"])
        for group in optimizer.param_groups
    )


def non_finite(tensors: Mapping[str, torch.Tensor], world: World) -> list[str]:
    """Return the names of the tensors with a number that is not finite; a collective.

    Args:
        tensors: Tensors by name, the same names on all ranks; of a sharded one each rank looks
            through its shard.
        world: This rank.
    """
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    if not names:
        return []
    flags = [~_local(tensors[name]).isfinite().all() for name in names]
    # One transfer and one collective for all of them.
    vector = torch.stack([flag.to(world.device) for flag in flags]).double()
    bad = PendingSum(vector, world).result()
    return [name for name, flag in zip(names, bad.tolist(), strict=True) if flag]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def some(names: list[str], of: int) -> str:
    """Return a count of names and the first of them, for messages."""
    return f"{len(names):,} of {of:,} tensors, such as {names[0]}"
