"""The section `cluster`: workers, their resources, and where they run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raymix.recipe.base import Integer, Number, RecipeModel


class ClusterConfig(RecipeModel):
    """Where the work runs."""

    workers: Integer = Field(default=1, ge=0, le=100_000)
    """Training workers; 0 trains in this process without Ray."""
    min_workers: Integer | None = Field(default=None, ge=1, le=100_000)
    """Workers to make do with where nodes are lost: the run goes on from its last checkpoint with
    as many as there is room for, and grows again up to `workers`. Left out, it waits for all."""
    workers_per_trial: Integer = Field(default=0, ge=0, le=100_000)
    """Training workers of each of the runs that `compare` and `tune` make side by side; 0 trains
    each in one process, which starts sooner."""
    gpus_per_worker: Literal[0, 1, "auto"] = "auto"
    """0, 1, or `auto`: 1 where the cluster has a GPU for every worker."""
    cpus_per_worker: Number = Field(default=1, gt=0)
    """Logical CPUs that Ray reserves per worker."""
    address: str | None = Field(default=None, min_length=1)
    """Ray address; left out, RAY_ADDRESS or else a private cluster on this machine."""
    wait_minutes: Number = Field(default=10, ge=0)
    """Minutes to wait for the nodes of a cluster that has an address and adds nodes on demand."""
    object_store_bytes: Integer | None = Field(default=None, ge=80_000_000)
    """Object store of a private cluster."""
    fork_workers: bool = True
    """Fork a private cluster's processes from one that has loaded their modules, on Linux."""
    max_failures: Integer = Field(default=3, ge=0)
    """Worker-group failures from which the run restarts by itself."""
