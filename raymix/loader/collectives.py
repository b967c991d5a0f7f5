"""Values exchanged between the ranks of a loader, over `torch.distributed`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from raymix.errors import TrainingError


class Collectives:
    """The exchanges that a loader needs; with one rank they return what they are given.

    Args of the constructor:
        rank: This rank.
        world_size: Ranks that share each batch.
        group: Their process group; None: all processes, whose number must be `world_size`.
    """

    def __init__(self, rank: int, world_size: int, group: Any = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group

    @property
    def connected(self) -> bool:
        """Return whether there are several ranks, and they have a process group of their own."""
        return (
            self.world_size > 1
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size(self._group) == self.world_size
        )

    @property
    def device(self) -> torch.device:
        """Return where tensors have to be that `sum` takes."""
        nccl = self.connected and torch.distributed.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order.

        Raises:
            TrainingError: If the ranks have no process group.
        """
        if self.world_size == 1:
            return [value]
        self._check()
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, on the same device.

        Raises:
            TrainingError: If the ranks have no process group.
        """
        if self.world_size > 1:
            self._check()
            torch.distributed.all_reduce(tensor, group=self._group)
        return tensor

    def _check(self) -> None:
        if not torch.distributed.is_initialized():
            raise TrainingError.at(
                "world_size",
                self.world_size,
                "the ranks must exchange losses or weights, but torch.distributed is not set up",
                fix="Call torch.distributed.init_process_group first",
            )
        # With tensor or pipeline parallelism the default group has more processes than there are
        # data-parallel ranks: sums over it would count every loss several times.
        size = torch.distributed.get_world_size(self._group)
        if size != self.world_size:
            raise TrainingError.at(
                "group",
                self._group and size,
                f"its processes, {size}, are not the {self.world_size} data-parallel ranks",
                fix="Give group= the process group of the data-parallel ranks",
            )
