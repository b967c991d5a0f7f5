"""A real Ray cluster of several nodes on this machine, with token authentication and jobs.

Each node is a raylet of its own (`ray start`), as on several machines; everything listens on
loopback. All its processes carry a mark in their environment, and by that mark they are ended,
whatever became of the process that started them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MARK = "RAYMIX_LOCAL_CLUSTER"
_START_S = 180.0
_END_S = 5.0
_DEMAND = """
import json, sys, time
from ray.autoscaler.v2.sdk import get_cluster_status
bundles = []
while not bundles:
    time.sleep(0.5)
    waiting = get_cluster_status(sys.argv[1]).resource_demands.placement_group_demand
    bundles = [
        request.bundle for demand in waiting for request in demand.bundles_by_count
        for _ in range(request.count)
    ]
print(json.dumps(bundles))
"""


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running cluster."""

    address: str
    """Of its job server."""
    gcs: str
    """For `ray.init`."""
    environment: dict[str, str]
    """What a process needs to be let in."""
    folder: Path
    """Its token, its session and its logs."""
    add_node: Callable[[float], None]
    """Starts one more node, with as many CPUs."""

    def wait_for_demand(self) -> list[dict[str, float]]:
        """Return the bundles of resources that wait for nodes, as an autoscaler is told of them."""
        done = subprocess.run(
            [sys.executable, "-c", _DEMAND, self.gcs],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def local_cluster(
    cpus: tuple[float, ...] = (1, 1), *, say: Callable[[str], object] = lambda text: None
) -> Iterator[LocalCluster]:
    """Yield a cluster with a node for each number of CPUs, the head first; ends all of it after.

    Args:
        cpus: What each node offers.
        say: Told what is being waited for.

    Raises:
        RuntimeError: If a node does not come up; with the end of its log.
    """
    mark = secrets.token_hex(8)
    # Sockets lie below it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rx-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    given = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    inner = {
        **os.environ,
        **given,
        _MARK: mark,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_worker_niceness": "0",
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        inner.pop(name, None)
    gcs, board = (f"127.0.0.1:{port}" for port in _free_ports(2))
    numbers = itertools.count(1)

    def add_node(count: float) -> None:
        number = next(numbers)
        say(f"starting node {number} with {count:g} CPUs")
        where = _head(gcs, board, folder) if number == 1 else [f"--address={gcs}"]
        _start(f"node-{number}", [f"--num-cpus={count:g}", *where], inner, folder)

    try:
        for count in cpus:
            add_node(count)
        yield LocalCluster(f"http://{board}", gcs, given, folder, add_node)
    finally:
        end_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def end_marked(mark: str) -> None:
    """End every process whose environment carries `mark`, at first gently."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _END_S
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while _marked(mark) and time.monotonic() < deadline:
            time.sleep(0.2)


def _marked(mark: str) -> list[int]:
    wanted, pids = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids


def _head(gcs: str, board: str, folder: Path) -> list[str]:
    host, _, port = board.partition(":")
    return [
        "--head",
        f"--port={gcs.partition(':')[2]}",
        f"--dashboard-host={host}",
        f"--dashboard-port={port}",
        f"--temp-dir={folder}",
    ]


def _start(name: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    # Jobs go through the agents, and another cluster's may have the usual port.
    (agent,) = _free_ports(1)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start"),
        *("--node-ip-address=127.0.0.1", "--object-store-memory=100000000"),
        "--disable-usage-stats",
        f"--dashboard-agent-listen-port={agent}",
        *arguments,
    ]
    log = folder / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=_START_S,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{name} did not start:\n{log.read_text()[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
