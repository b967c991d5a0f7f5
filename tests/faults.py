"""What can happen to a run, and what it is afterwards: for `make bench-faults` and its test.

A fault is made to happen to `raymix train` as a user runs it, at a moment that is drawn. Then the
run goes on, by itself or by the same command, to its end, and is held against one that nothing
happened to: the same batch in every step, no token read twice or lost.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymix.train.rundir import read_metrics
from tests.e2e.conftest import Shell

BOUND_S = 300.0
"""No fault may keep a run longer than this from going on; busy machines included."""
STEPS = 120
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
        except (OSError, ValueError):
            return 0
        now = max((line["step"] for line in lines if "loss" in line), default=0)
        if now < self.farthest:
            self.repeated += self.farthest - now
        self.farthest = now
        return now

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
        deadline = time.monotonic() + BOUND_S
        while not condition():
            if time.monotonic() > deadline:
                raise Hung(f"{self.name}: waited {BOUND_S:g} s for {what}\n{self.said()[-2000:]}")
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def pids(self, title: str) -> list[int]:
        """Return this run's own processes of a title, those of other clusters left alone."""
        assert self.process is not None
        found = (pid for pid in descendants(self.process.pid) if title in title_of(pid))
        return sorted(found)

    def kill_one(self, title: str) -> None:
        """Kill a process of this run by -9."""
        self._wait(lambda: bool(self.pids(title)) or self.ended, f"a process {title}")
        os.kill(self.pids(title)[0], signal.SIGKILL)

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


def worker_killed(scene: Scene) -> None:
    scene.kill_one("ray::RayTrainWorker")


def controller_killed(scene: Scene) -> None:
    scene.kill_one("ray::MixtureController")


def plane_killed(scene: Scene) -> None:
    scene.kill_one("ray::BlockPlane")


def train_controller_killed(scene: Scene) -> None:
    """Ray Train's own controller, not ours; the run ends, and its command brings it on."""
    scene.kill_one("ray::TrainController")
    if scene.ends() != 0:
        scene.start()


def all_actors_killed(scene: Scene) -> None:
    for title in ("RayTrainWorker", "MixtureController", "BlockPlane"):
        scene.kill_one(f"ray::{title}")


def driver_killed(scene: Scene) -> None:
    scene.kill_driver()
    scene.start()


def machine_lost(scene: Scene) -> None:
    """All of its processes at once."""
    scene.kill_driver("")
    scene.start()


def gcs_killed(scene: Scene) -> None:
    """The head of the cluster, Ray's own record of it."""
    scene.kill_one("gcs_server")
    assert scene.ends() != 0
    scene.start()


def raylet_killed(scene: Scene) -> None:
    scene.kill_one("raylet/raylet")
    assert scene.ends() != 0
    scene.start()


def interrupted(scene: Scene) -> None:
    assert scene.ask(signal.SIGINT) == 130
    scene.start()


def preempted(scene: Scene) -> None:
    """A notice that the machine goes away: SIGTERM."""
    assert scene.ask(signal.SIGTERM) == 130
    scene.start()


def checkpoint_cut(scene: Scene) -> None:
    """Killed, and the newest checkpoint is cut short."""
    scene.kill_driver()
    newest = max((scene.run / "checkpoints").glob("step-*"), key=lambda path: path.name)
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    scene.start()


def metrics_cut(scene: Scene) -> None:
    """Killed in the middle of a line."""
    scene.kill_driver()
    metrics = scene.run / "metrics.jsonl"
    os.truncate(metrics, metrics.stat().st_size - 40)
    scene.start()


def shard_corrupted(scene: Scene) -> None:
    """Killed, a shard turns corrupt, is refused by its name, and is put back."""
    scene.kill_driver()
    shard = next((scene.shell.cwd / "corpus" / "books" / "train").glob("shard-*.arrow"))
    kept = shard.with_suffix(".kept")
    shutil.copyfile(shard, kept)
    try:
        data = bytearray(shard.read_bytes())
        data[200 : len(data) // 2] = b"\xff" * (len(data) // 2 - 200)
        shard.write_bytes(data)
        scene.start()
        code = scene.ends()
        assert code == 2, scene.said()[-2000:]
        assert shard.name in scene.said()
    finally:
        kept.replace(shard)
    scene.start()


def fewer_workers(scene: Scene) -> None:
    """Killed, and there is room for one worker only."""
    scene.kill_driver()
    scene.start("cluster.workers=1")


def more_workers(scene: Scene) -> None:
    """Killed while it had two workers, and goes on with three."""
    scene.kill_driver()
    scene.start("cluster.workers=3", "cluster.cpus_per_worker=0.5")


def node_lost(scene: Scene) -> None:
    """A machine with a worker on it is gone; there is another with room."""
    assert scene.nodes is not None
    scene.nodes.lose_one_with("ray::RayTrainWorker")


class Nodes:
    """A cluster of a head that trains nothing and three machines with a CPU each, on this one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [
            self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(3)
        ]

    def lose_one_with(self, title: str) -> None:
        """Kill a machine on which there is a process of this title."""
        for node in self.workers:
            raylet = node.all_processes["raylet"][0].process.pid
            if any(title in title_of(pid) for pid in descendants(raylet)):
                self.workers.remove(node)
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError(f"no machine has a process {title}")

    def close(self) -> None:
        self.cluster.shutdown()


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    happens: Callable[[Scene], None]
    sees: str
    """What the user does, or need not do."""
    changes: tuple[str, ...] = ()
    on_nodes: bool = False
    """On a cluster of several machines."""


FAULTS: dict[str, Fault] = {
    "worker killed": Fault(worker_killed, "goes on by itself"),
    "mixture controller killed": Fault(controller_killed, "goes on by itself"),
    "block plane killed": Fault(plane_killed, "goes on by itself"),
    "worker, controller and plane killed": Fault(all_actors_killed, "goes on by itself"),
    "Ray Train's controller killed": Fault(train_controller_killed, "same command again"),
    "driver killed": Fault(driver_killed, "same command again"),
    "node lost": Fault(node_lost, "goes on by itself on another node", on_nodes=True),
    "raylet killed": Fault(raylet_killed, "an error; same command again"),
    "Ray's head killed": Fault(gcs_killed, "an error; same command again"),
    "every process killed": Fault(machine_lost, "same command again"),
    "Ctrl-C": Fault(interrupted, "a checkpoint, exit code 130; same command again"),
    "preemption notice (SIGTERM)": Fault(preempted, "a checkpoint, exit code 130; again"),
    "checkpoint cut short": Fault(checkpoint_cut, "goes on from the one before"),
    "metrics cut in a line": Fault(metrics_cut, "same command again"),
    "shard turns corrupt": Fault(shard_corrupted, "exit code 2 and its name; again once mended"),
    "one worker instead of two": Fault(fewer_workers, "cluster.workers=1"),
    "three workers instead of two": Fault(more_workers, "cluster.workers=3"),
    "object store of 80 MB, worker killed": Fault(
        worker_killed, "goes on by itself", ("cluster.object_store_bytes=80000000",)
    ),
}


@dataclass(frozen=True)
class Ending:
    """What came of a fault."""

    at: int
    """The step it happened after."""
    recovered_s: float
    """From the fault to the first step that had not been done before."""
    repeated: int
    """Steps done again."""
    differing: int
    """Steps whose batch is not that of the run that nothing happened to, missing ones included."""
    tokens: dict[str, int]
    """By domain, tokens read beyond (or short of) that run's."""
    loss: float
    """Greatest relative difference of a step's loss."""


def endure(shell: Shell, name: str, fault: Fault, at: int, expected: Path) -> Ending:
    """Return what comes of a fault after step `at`."""
    nodes = Nodes() if fault.on_nodes else None
    if nodes is not None:
        shell = replace(shell, address=nodes.cluster.address)
    scene = Scene(shell, name, fault.changes, nodes)
    try:
        scene.start()
        scene.reaches(at)
        before, began = scene.farthest, time.monotonic()
        fault.happens(scene)
        scene.reaches(before + 1)
        recovered = time.monotonic() - began
        code = scene.ends()
        assert code == 0, scene.said()[-3000:]
    finally:
        scene.close()
        if nodes is not None:
            nodes.close()
    assert "Traceback" not in scene.said(), scene.said()[-3000:]
    return compared(scene, expected, at=before, recovered=recovered)


def compared(scene: Scene, expected: Path, *, at: int, recovered: float) -> Ending:
    """Return how a run that was disturbed differs from one that was not."""
    mine, theirs = steps_of(scene.run), steps_of(expected)
    by_step = {line["step"]: line for line in mine}
    assert len(by_step) == len(mine), "a step is in the metrics twice"
    same = [line for line in theirs if by_step.get(line["step"], {}).get("batch_hash") ==
            line["batch_hash"]]  # fmt: skip
    read, due = totals(mine), totals(theirs)
    return Ending(
        at=at,
        recovered_s=recovered,
        repeated=scene.repeated,
        differing=max(len(theirs), len(mine)) - len(same),
        tokens={name: read.get(name, 0) - due.get(name, 0) for name in read.keys() | due.keys()},
        loss=max(abs(by_step[line["step"]]["loss"] - line["loss"]) / line["loss"] for line in same),
    )


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def totals(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Return tokens read by domain."""
    found: dict[str, int] = {}
    for line in lines:
        for name, tokens in line["counts"].items():
            found[name] = found.get(name, 0) + tokens
    return found
