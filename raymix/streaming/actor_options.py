"""Where the actors of a run live, and that they come back."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_CALLS_AT_ONCE = 10_000


def actor_options(name: str | None, *, movable: bool = True) -> dict[str, Any]:
    """Return the options of an actor on this node that restarts as often as it dies.

    Args:
        name: Name to find it by, if any.
        movable: Whether another node does where this one is gone.
    """
    here = ray.get_runtime_context().get_node_id()
    return {
        "name": name,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": _CALLS_AT_ONCE,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=movable),
    }
