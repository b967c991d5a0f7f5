"""Actor placement and restart options."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# More than the ranks of a run: calls that wait hold a slot each, and one that finds none would
# block the very call that ends the waiting.
_MAX_CONCURRENT_CALLS = 10_000


def actor_options(name: str | None, *, movable: bool = True) -> dict[str, Any]:
    """Return the options of an actor on this node that restarts whenever it dies.

    Args:
        name: Name for `ray.get_actor`, if any.
        movable: Whether it may restart on another node when this one is gone.
    """
    node_id = ray.get_runtime_context().get_node_id()
    return {
        "name": name,
        # Trainers may reserve every CPU of the cluster; an actor that needs one would not start.
        "num_cpus": 0,
        "max_restarts": -1,
        # Ray repeats calls that were lost with the process, so all methods must be idempotent.
        "max_task_retries": -1,
        "max_concurrency": _MAX_CONCURRENT_CALLS,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=movable),
    }
