"""The job that a run sends to its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raymix.recipe import Recipe
from raymix.training.run.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Job:
    """Picklable job sent to the workers."""

    recipe: Recipe
    run: RunDirectory
    steps: int
    micro_batch_rows: int
    on_gpu: bool
    threads: int | None
    """Threads per worker where the user set them; None to share the cores."""
    session: str
    """Unique to this start of the run; part of the names of its actors."""
    tracking_id: str = ""
    """The run's id in trackers, the same at every start."""
    domains_from: int | None = None
    """The step from which on the run reads the domains of the recipe, where they were others."""
    controller: Any = None
    """The controller's actor; None without Ray."""
    plane: Any = None
    """The block plane's actor; None without Ray."""
    sequence_scheduler: Any = None
    """The sequence scheduler's actor; None without Ray, and for packed rows."""
