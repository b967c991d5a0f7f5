"""A Ray cluster of our own, which nobody but this machine can reach.

Whoever reaches the sockets of Ray's processes can run code in them, and Ray listens on all
addresses of a machine, unless it takes that machine for one that cannot be part of a cluster. A
private cluster is just that, so it is started as Ray starts one there: on the loopback address.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from raymix._utils.fork_server.server import Preload, can_fork, spawned_server
from raymix.errors import ClusterError

LOOPBACK = "127.0.0.1"

# The path of a socket has at most 107 bytes (unix(7)), and Ray's end in this, with a date and a
# process number of up to seven digits.
_SOCKET = "/session_2026-12-01_00-00-00_000000_1234567/sockets/plasma_store"
_MAX_DIRECTORY_BYTES = 107 - len(_SOCKET)
# Memory last: Ray's logs and spilled objects go there as well.
_SHORT_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")


# Socket of the server that the workers of a private cluster are forked from; see `forked_workers`.
_fork_server: str | None = None


@contextmanager
def forked_workers(preload: Preload) -> Iterator[None]:
    """Fork the workers of a private cluster that starts in the context from one process.

    That process loads its modules while this one goes on. Does nothing where processes cannot be
    forked: then each worker loads its modules itself.

    Args:
        preload: The modules that workers need.
    """
    global _fork_server
    if not can_fork():
        yield
        return
    with spawned_server(preload) as _fork_server:
        try:
            yield
        finally:
            _fork_server = None


def start_private(**options: Any) -> None:
    """Start and join a Ray cluster whose processes listen on the loopback address only.

    It has no dashboard. Clusters that are joined later are not touched by this.

    Args:
        options: Further ones of `ray.init`.

    Raises:
        ClusterError: If the temporary directory's path is too long for sockets, and no other
            directory can be used.
    """
    import ray

    from raymix._utils.compat.ray_core import (
        single_machine_mode,
        without_monitors,
        without_uv_environment,
        workers_from,
    )

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # `local`: RAY_ADDRESS may name a cluster that is not wanted.
    settings |= {"address": "local", "include_dashboard": False, **options}
    if (directory := _session_directory()) is not None:
        settings["_temp_dir"] = directory
    forked = workers_from(_fork_server) if _fork_server else nullcontext()
    with single_machine_mode(), without_monitors(), without_uv_environment(), forked:
        ray.init(**settings)


def _session_directory() -> str | None:
    """Return a directory for Ray's sessions; None where its own has a path of usable length.

    Schedulers such as Slurm set TMPDIR to long paths.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    own = os.path.join(os.environ[variable] if variable else "/tmp", "ray")
    excess = len(os.fsencode(own)) - _MAX_DIRECTORY_BYTES
    if excess <= 0:
        return None
    for parent in _SHORT_DIRECTORIES:
        directory = Path(parent) / f"raymix-{os.getuid()}"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            # Another user may have made the name first; `lstat` does not follow a link.
            if directory.lstat().st_uid == os.getuid() and not directory.is_symlink():
                return str(directory / "ray")
        except OSError:
            continue
    raise ClusterError.at(
        variable or "TMPDIR",
        os.environ.get(variable or "TMPDIR", ""),
        f"{excess} bytes too long for Ray's sockets, and {', '.join(_SHORT_DIRECTORIES)} cannot be "
        "written",
        fix="Set RAY_TMPDIR to a directory with a short path",
    )


def on_loopback() -> bool:
    """Return whether the cluster that this process has joined is on the loopback address only.

    Asked of the nodes: this process may be elsewhere, at the other end of a tunnel.
    """
    import ray

    alive = (node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    return set(alive) == {LOOPBACK}
