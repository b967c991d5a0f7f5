"""Data parallelism: one process, DDP, or FSDP2; and the collectives of a run.

Gradients are summed over ranks, never averaged: the loss is already divided by the label count
of the global batch, so the sum is its gradient for any assignment of rows to ranks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from raymix._utils.sharded import full_tensor, is_sharded
from raymix.recipe.training import TrainConfig
from raymix.training.model.loss import PackedLoss


@dataclass(frozen=True, slots=True)
class World:
    """This process among the workers of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1
    """Workers on this machine, including this one."""

    @property
    def is_writer(self) -> bool:
        """Return whether this rank writes files and decides for all ranks."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank (a collective, for start-up only)."""
        if self.size == 1:
            return value
        # torch fills the list in place, after pickling: too slow for use in a step.
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


class Replica(Protocol):
    """The model of one rank, as the loop uses it."""

    world: World
    model: PackedLoss
    """The unwrapped loss module; its `.model` is the Hugging Face model."""
    module: nn.Module
    """The wrapped module, which the loop calls."""
    gradient_scale: float
    """Factor of the loss that makes the reduced gradient a sum over ranks."""
    sharded: bool
    """Whether parameters are DTensors."""

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of one micro-batch; gradients are reduced only in the last."""
        ...


class SingleReplica:
    """One process, without communication."""

    sharded = False
    gradient_scale = 1.0

    def __init__(self, model: PackedLoss, world: World) -> None:
        """Use `model` unwrapped."""
        self.world = world
        self.model = model
        self.module: nn.Module = model

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()


class DdpReplica:
    """A full copy per rank; DDP averages gradients, so the loss is scaled by the world size."""

    sharded = False

    def __init__(self, model: PackedLoss, world: World) -> None:
        """Wrap `model`; DDP broadcasts rank 0's parameters."""
        self.world = world
        self.model = model
        self.gradient_scale = float(world.size)
        ddp = nn.parallel.DistributedDataParallel
        # Buffers (rotary tables) are equal on all ranks, so DDP need not broadcast them in each
        # forward pass; torch 2.13 renamed the option.
        renamed = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if renamed else "broadcast_buffers": False,
            "device_ids": [world.device] if world.device.type == "cuda" else None,
        }
        # Views into the buckets instead of copies: saves memory of the size of the gradients.
        self._ddp = ddp(model, gradient_as_bucket_view=True, **options)
        self.module: nn.Module = self._ddp

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return DDP's `no_sync` for all passes but the last."""
        return contextlib.nullcontext() if last else self._ddp.no_sync()


class FsdpReplica:
    """A shard of each parameter per rank (FSDP2), gathered block by block."""

    sharded = True
    gradient_scale = 1.0

    def __init__(self, model: PackedLoss, world: World, *, bf16: bool) -> None:
        """Shard `model` in place; all ranks must have the same weights before."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.world = world
        self.model = model
        mesh = init_device_mesh(world.device.type, (world.size,))
        # Gradients are reduced in float32: a bf16 sum over many ranks would lose small ones.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None
        policy = policy or MixedPrecisionPolicy()
        # Inner modules first, as `fully_shard` leaves out parameters that are sharded already; the
        # call on the model takes embeddings and head.
        for block in _repeated_blocks(model.model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        if not isinstance(model, FSDPModule):
            raise TypeError("fully_shard did not turn the model into an FSDPModule")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A plain sum: gloo has no sum with a factor.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._fsdp = model
        self.module: nn.Module = model

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Reduce gradients only in the last micro-batch."""
        self._fsdp.set_requires_gradient_sync(last)
        yield


def training_precision(
    device_type: str, *, bf16: bool
) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context of forward passes."""
    return torch.autocast(device_type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    # The layers, by transformers' private list of classes that must stay on one device.
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def place_model(model: PackedLoss, config: TrainConfig, world: World, *, bf16: bool) -> Replica:
    """Return `model` on this rank's device, wrapped as `train.parallel` says."""
    # All before wrapping: DDP and FSDP2 take the parameters on the device where they are, and hook
    # into the compiled module. Both support only non-reentrant checkpointing in full.
    if config.activation_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(world.device)
    if config.compile:
        model.compile()
    if world.size == 1:
        return SingleReplica(model, world)
    if config.parallel == "fsdp2":
        return FsdpReplica(model, world, bf16=bf16)
    return DdpReplica(model, world)


class HostCopy:
    """An asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Start copying `tensor` as it will be after the work queued so far."""
        self._host = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # From pageable memory the copy would block the host, whatever `non_blocking` says.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> torch.Tensor:
        """Return the copy; waits for it, but not for work queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class PendingSum:
    """A vector being summed over ranks while the next step runs."""

    def __init__(self, vector: torch.Tensor, world: World) -> None:
        """Start the sum of `vector` (float64, changed in place)."""
        self._vector = vector
        self._work = dist.all_reduce(vector, async_op=True) if world.size > 1 else None
        self._copy: HostCopy | None = None
        if vector.is_cuda:
            # On NCCL's work `wait` makes the CUDA stream wait, not the host.
            if self._work is not None:
                self._work.wait()
            self._copy = HostCopy(vector)

    def result(self) -> torch.Tensor:
        """Return the sum on the CPU; waits for it."""
        if self._copy is not None:
            return self._copy.get()
        if self._work is not None:
            self._work.wait()
        return self._vector


def full_tensors(tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Return unsharded CPU copies on rank 0, an empty dict on other ranks; a collective."""
    copies: dict[str, torch.Tensor] = {}
    # One tensor after the other, so that a GPU never has more than one unsharded copy.
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if world.is_writer:
            copies[name] = full.detach().cpu().contiguous()
    return copies


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the device of `parameter`, sharded in the same way."""
    moved = tensor.to(parameter.device)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        # `src_data_rank=None`: every rank has read the full tensor, so nothing is communicated.
        return distribute_tensor(
            moved, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return moved
