"""Start of a run's actors: placement, restarts, and arguments that outlive them."""

from __future__ import annotations

import weakref
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# More than the ranks of a run: calls that wait hold a slot each, and one that finds none would
# block the very call that ends the waiting.
_MAX_CONCURRENT_CALLS = 10_000
# Ray's own limit is 100 KiB for an argument, with its description.
_MAX_INLINE_BYTES = 90_000
# By handle, the references of an actor's arguments. Ray runs the constructor again when an actor
# restarts, but drops arguments above 100 KB once it has run (ray#53727): they must be held here, in
# the process that owns actor and arguments.
_arguments: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def start_actor(
    actor_class: Any, name: str | None, *, movable: bool = True, arguments: dict[str, Any]
) -> Any:
    """Return an actor on this node, owned by this process, that restarts whenever it dies.

    Args:
        actor_class: What `ray.remote` made of its class.
        name: Name for `ray.get_actor`, if any.
        movable: Whether it may restart on another node when this one is gone.
        arguments: Those of its constructor, of any size.
    """
    node_id = ray.get_runtime_context().get_node_id()
    passed = {key: _by_reference_if_large(value) for key, value in arguments.items()}
    handle = actor_class.options(
        name=name,
        # Trainers may reserve every CPU of the cluster; an actor that needs one would not start.
        num_cpus=0,
        max_restarts=-1,
        # Ray repeats calls that were lost with the process, so all methods must be idempotent.
        max_task_retries=-1,
        max_concurrency=_MAX_CONCURRENT_CALLS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=movable),
    ).remote(**passed)
    _arguments[handle] = [each for each in passed.values() if isinstance(each, ray.ObjectRef)]
    return handle


def _by_reference_if_large(value: Any) -> Any:
    # A small one stays with the actor's description, in the cluster's head; for a reference Ray
    # prints an error about restarts at every start.
    return value if len(ray.cloudpickle.dumps(value)) <= _MAX_INLINE_BYTES else ray.put(value)
