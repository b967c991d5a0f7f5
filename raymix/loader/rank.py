"""The rank of this process and the number of ranks, from the arguments or the environment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch.distributed

from raymix.errors import TrainingError


@dataclass(frozen=True, slots=True)
class RankAndWorld:
    """A data-parallel rank and their number: the part of each batch that a process reads."""

    rank: int
    world_size: int
    source: str
    """Where both are from, for people."""


def find_rank(rank: int | None = None, world_size: int | None = None) -> RankAndWorld:
    """Return the data-parallel rank: as given, else of this process in its group, else 0 of 1.

    In this order: the arguments, `torch.distributed`, Ray Train's context, the variables RANK and
    WORLD_SIZE (torchrun, accelerate launch). With tensor, pipeline or context parallelism the
    ranks of one data-parallel coordinate read the same batch, so both must be given.

    Raises:
        TrainingError: If one is given without the other, or the rank is outside the world.
    """
    if (rank is None) != (world_size is None):
        missing = "rank" if rank is None else "world_size"
        raise TrainingError.at(
            missing, None, "rank and world_size go together", fix="Give both, or neither"
        )
    if rank is not None and world_size is not None:
        return _checked(RankAndWorld(rank, world_size, "the arguments"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        distributed = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return RankAndWorld(*distributed, "torch.distributed")
    return _from_ray_train() or _from_variables() or RankAndWorld(0, 1, "a single process")


def _from_ray_train() -> RankAndWorld | None:
    # A Ray Train worker has imported it; importing it here would take a second for nothing.
    if "ray.train" not in sys.modules:
        return None
    from ray.train import get_context

    try:
        context = get_context()
        numbers = context.get_world_rank(), context.get_world_size()
    except Exception:  # noqa: BLE001 - outside a worker Ray raises what its version likes
        return None
    if numbers[0] is None or numbers[1] is None:
        return None
    return RankAndWorld(*numbers, "Ray Train's context")


def _from_variables() -> RankAndWorld | None:
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    numbers: list[int] = []
    for name, value in values.items():
        if value is None:
            return None
        if not value.isdecimal():
            raise TrainingError.at(name, value, "not a whole number", fix="Unset it, or mend it")
        numbers.append(int(value))
    rank, world_size = numbers
    return _checked(RankAndWorld(rank, world_size, "RANK and WORLD_SIZE"))


def _checked(place: RankAndWorld) -> RankAndWorld:
    if place.world_size < 1:
        raise TrainingError.at(
            "world_size", place.world_size, "not a number of ranks", allowed="Allowed: 1 and more"
        )
    if not 0 <= place.rank < place.world_size:
        raise TrainingError.at(
            "rank",
            place.rank,
            f"outside a world of {place.world_size}, which {place.source} says",
            allowed=f"Allowed: 0 to {place.world_size - 1}",
        )
    return place
