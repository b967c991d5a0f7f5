"""The modules that the processes of a run have loaded when they start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from raymix._utils.fork_server.server import Preload
from raymix._utils.private_cluster import forked_workers
from raymix.recipe import Recipe
from raymix.training.host.machine import ray_address
from raymix.training.launch.cluster import apply_malloc_variables

PRELOAD = Preload(
    modules=(
        "raymix.training.setup",
        "raymix.training.loop",
        "transformers.modeling_layers",
    ),
    # The driver's loads what Ray Train's own processes need.
    group_modules=("raymix.training.launch.driver", "raymix.training.launch.worker"),
    loader="raymix._utils.compat.ray_core:load_before_forks",
    hook=f"{apply_malloc_variables.__module__}:{apply_malloc_variables.__name__}",
)
_TRIAL_MODULES = ("ray.tune", "raymix.tuning.runs.trials", "raymix.tuning.runs.trial_task")


@contextmanager
def forked_training_workers(recipe: Recipe) -> Iterator[None]:
    """Fork the processes of a run in a private cluster; does nothing for other runs.

    For a command alone; early, as the processes' modules are loaded meanwhile.
    """
    if recipe.cluster.workers:
        with _forked(recipe, PRELOAD):
            yield
    else:
        yield


@contextmanager
def forked_trials(recipe: Recipe) -> Iterator[None]:
    """Fork the processes of trials in a private cluster, as `forked_training_workers` does."""
    with _forked(recipe, replace(PRELOAD, group_modules=(*PRELOAD.group_modules, *_TRIAL_MODULES))):
        yield


@contextmanager
def _forked(recipe: Recipe, preload: Preload) -> Iterator[None]:
    # The nodes of other clusters start their processes themselves.
    if not recipe.cluster.fork_workers or ray_address(recipe.cluster.address) is not None:
        yield
        return
    with forked_workers(preload):
        yield
