"""A run as a user starts it, in which something can be made to happen: processes, nodes, disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymix.training.run.rundir import read_metrics
from tests.support.shell import Shell

BOUND_S = 300.0
"""No fault may keep a run longer than this from going on; busy machines included."""
RECIPE = "faults.yaml"


class Hung(AssertionError):
    """Something took longer than its bound."""


@dataclass
class Scene:
    """A run to which something happens."""

    shell: Shell
    name: str
    changes: tuple[str, ...] = ()
    nodes: Nodes | None = None
    process: subprocess.Popen[str] | None = None
    farthest: int = 0
    """The last step that was seen."""
    repeated: int = 0
    """Steps that were done again."""
    longest_s: float = 0.0
    """The longest time without a step that had not been done before."""
    _most: int = 0
    _since: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> Path:
        return self.shell.cwd / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.shell.cwd / "runs" / f"{self.name}.log"

    def start(self, *changes: str) -> None:
        """Give the command, or give it again."""
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.shell.command("train", RECIPE, f"name={self.name}", *self.changes, *changes),
                cwd=self.shell.cwd,
                env={**self.shell.environment(), "RAY_AUTH_MODE": "disabled"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                stdin=subprocess.DEVNULL,
            )

    def step(self) -> int:
        """Return the last step in the metrics, having noted what was done again."""
        try:
            lines = read_metrics(self.run / "metrics.jsonl")
            now = max((line["step"] for line in lines if "loss" in line), default=0)
        except OSError:
            return 0
        if now < self.farthest:
            self.repeated += self.farthest - now
        self.farthest = now
        if now > self._most:
            self.longest_s = max(self.longest_s, time.monotonic() - self._since)
            self._most, self._since = now, time.monotonic()
        return now

    def begin_watch(self) -> None:
        """Forget how long steps took so far."""
        self.longest_s, self._since = 0.0, time.monotonic()

    def reaches(self, step: int) -> None:
        """Wait for a step."""
        self._wait(lambda: self.step() >= step or self.ended, f"step {step}")

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def ends(self) -> int:
        """Wait for the process, and return its exit code."""
        self._wait(lambda: (self.step(), self.ended)[1], "its end")
        assert self.process is not None
        return self.process.wait()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        while not condition():
            if time.monotonic() > max(began, self._since) + BOUND_S:
                wrong = f"{self.name}: no new step for {BOUND_S:g} s, waiting for {what}"
                raise Hung(f"{wrong}\n{self.said()[-2000:]}")
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def pids(self, title: str) -> list[int]:
        """Return this run's own processes of a title, those of other clusters left alone."""
        assert self.process is not None
        pids = (pid for pid in descendants(self.process.pid) if title in title_of(pid))
        return sorted(pids)

    def kill_one(self, title: str) -> None:
        """Kill a process of this run by -9."""
        pids: list[int] = []

        def there() -> bool:
            pids[:] = self.pids(title)
            return bool(pids) or self.ended

        self._wait(there, f"a process {title}")
        assert pids, f"{self.name} ended before a process {title} could be killed"
        os.kill(pids[0], signal.SIGKILL)

    def kill_driver(self, *titles: str) -> None:
        """Kill the command by -9, with processes of it where titles are given."""
        assert self.process is not None
        every = [pid for title in titles for pid in self.pids(title)]
        for pid in (self.process.pid, *every):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, number: int) -> int:
        """Send a signal, and return how the command then ended."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.ends()

    def close(self) -> None:
        """Leave no process behind."""
        if self.process is not None and not self.ended:
            self.kill_driver("")


def title_of(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    left = [pid]
    while left:
        children = parents.get(left.pop(), [])
        yield from children
        left += children


class Nodes:
    """A cluster of a head that trains nothing and machines with a CPU each, on this one."""

    def __init__(self, machines: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []
        for _ in range(machines):
            self.add()

    @classmethod
    @contextmanager
    def up(cls, machines: int) -> Iterator[Nodes]:
        """Have the cluster for a while."""
        nodes = cls(machines)
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()

    def add(self) -> None:
        """Start another machine."""
        self.workers.append(self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000))

    def lose_one_with(self, title: str) -> None:
        """Kill a machine on which there is a process of this title."""
        for node in self.workers:
            raylet = node.all_processes["raylet"][0].process.pid
            if any(title in title_of(pid) for pid in descendants(raylet)):
                self.workers.remove(node)
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError(f"no machine has a process {title}")


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """Have a disk of `size` bytes at `path`; what is on it stays there afterwards.

    Raises:
        AssertionError: Where this process may not mount one.
    """
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "raymix-test", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no disk can be mounted here: {done.stderr}"
    try:
        yield
    finally:
        with tempfile.TemporaryDirectory() as backup:
            shutil.copytree(path, backup, dirs_exist_ok=True)
            subprocess.run(["umount", str(path)], check=True)
            shutil.copytree(backup, path, dirs_exist_ok=True)
