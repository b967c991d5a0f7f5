"""Private API of Ray's core, read in Ray 2.60."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import ActorClassID, WorkerID, actor
from ray._private import node as ray_node
from ray._private import ray_constants, worker
from ray._private.node import Node
from ray._private.parameter import RayParams

from raymix._utils.fork_server import setup_worker
from raymix._utils.fork_server.server import load


@contextmanager
def single_machine_mode() -> Iterator[None]:
    """Have Ray take this machine for one that cannot be part of a cluster.

    Only then does Ray keep a loopback address that it is given; otherwise it replaces it by the
    machine's own and listens on all addresses. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 says the same,
    but is read once, when Ray is imported, which may have happened long ago.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def without_monitors() -> Iterator[None]:
    """Have Ray start no autoscaler, log monitor and API server with a cluster.

    Each is a process that takes two seconds of a core to start. No option of `ray.init` leaves them
    out, although nothing can be scaled on one machine, nobody reads the logs that are sent, and
    there is no dashboard.
    """
    names = ("start_monitor", "start_log_monitor", "start_api_server")
    before = {name: getattr(Node, name) for name in names}
    for name in before:
        setattr(Node, name, _start_nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def without_uv_environment() -> Iterator[None]:
    """Have Ray start workers in this process' own environment where `uv run` started it.

    Otherwise Ray uploads the working directory, of 512 MB at most, and has uv make an environment
    for each worker. RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 says the same, but is read when Ray is
    imported.
    """
    before = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before


@contextmanager
def workers_from(server: str) -> Iterator[None]:
    """Have Ray take its worker processes from a server of forks, in the cluster that starts here.

    No option of `ray.init` names the script that a worker runs, which is where to ask the server.

    Args:
        server: Path of the server's socket: see `raymix._utils.fork_server`.
    """
    script = str(Path(setup_worker.__file__))
    workers = Path(ray_node.__file__).parent / "workers"
    variables = {
        setup_worker.SERVER: server,
        setup_worker.SETUP_SCRIPT: str(workers / ray_constants.SETUP_WORKER_FILENAME),
        setup_worker.WORKER_SCRIPT: str(workers / "default_worker.py"),
    }
    original = Node.__init__

    def start(self: Node, ray_params: RayParams, *args: Any, **options: Any) -> None:
        ray_params.update_if_absent(worker_path=script, setup_worker_path=script)
        original(self, ray_params, *args, **options)

    os.environ.update(variables)
    # pyrefly: ignore [method-assign] - Ray offers nothing else
    Node.__init__ = start
    try:
        yield
    finally:
        # pyrefly: ignore [method-assign] - as above
        Node.__init__ = original
        for name in variables:
            del os.environ[name]


def load_before_forks(modules: Sequence[str]) -> bool:
    """Import modules, and return whether forks of this process draw identifiers of their own.

    Ray's identifiers come from a random generator that is seeded when it is first used, and forks
    would go on with the same numbers. Importing a module uses it for one thing, the identifiers of
    actor classes, which are drawn by the system instead.
    """
    actor.ActorClassID = _SystemActorClassID  # pyrefly: ignore [bad-assignment] - for the imports
    try:
        load(modules)
    finally:
        actor.ActorClassID = ActorClassID
    return _identifier_in_fork() != _identifier_in_fork()


class _SystemActorClassID:
    @staticmethod
    def from_random() -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


def _identifier_in_fork() -> bytes:
    """Return the first random identifier that a fork of this process draws."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, WorkerID.from_random().binary())
        os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    with os.fdopen(read_end, "rb") as file:
        return file.read()


def _start_nothing(node: Node, **options: Any) -> None:
    pass


def dead_processes() -> list[str]:
    """Return the names of processes that this process started for its cluster and that have died.

    Ray itself ends the driver some seconds after the raylet is gone, without a message. Empty for
    a cluster that was joined, not started.
    """
    node = worker._global_node
    return [] if node is None else [kind for kind, _ in node.dead_processes()]
