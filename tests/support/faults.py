"""What can happen to a run, and what it is afterwards: for `make bench-faults` and its test.

A fault is made to happen to `raymix train` as a user runs it, at a moment that is drawn. Then the
run goes on, by itself or by the same command, to its end, and is held against one that nothing
happened to: the same batch in every step, no token read twice or lost.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.scenes import Nodes, Scene, small_disk
from tests.support.shell import Shell, steps_of

STEPS = 120
SMALL_DISK = 24_000_000
"""Bytes of a disk that has room for a run of the table, and not for much more."""


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
    _own_cluster_lost(scene, "gcs_server")


def raylet_killed(scene: Scene) -> None:
    _own_cluster_lost(scene, "raylet/raylet")


def _own_cluster_lost(scene: Scene, title: str) -> None:
    scene.kill_one(title)
    assert scene.ends() == 1, scene.said()[-3000:]
    assert "was killed, or crashed" in scene.said(), scene.said()[-3000:]
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


@contextmanager
def corrupt(shell: Shell) -> Iterator[str]:
    """Have half a shard overwritten, for a while; yields its name."""
    shard = next((shell.cwd / "corpus" / "books" / "train").glob("shard-*.arrow"))
    backup = shard.with_suffix(".kept")
    shutil.copyfile(shard, backup)
    try:
        with shard.open("r+b") as file:
            file.seek(200)
            file.write(b"\xff" * (backup.stat().st_size // 2 - 200))
        yield shard.name
    finally:
        backup.replace(shard)


def shard_corrupted(scene: Scene) -> None:
    """Killed, a shard turns corrupt, is refused by its name, and is put back."""
    scene.kill_driver()
    with corrupt(scene.shell) as name:
        scene.start()
        assert scene.ends() == 2, scene.said()[-2000:]
        assert name in scene.said()
    scene.start()


def shard_corrupted_under_way(scene: Scene) -> None:
    """A shard turns corrupt while it is read; who reads it again refuses it by its name."""
    with corrupt(scene.shell) as name:
        all_actors_killed(scene)
        assert scene.ends() == 2, scene.said()[-2000:]
        assert name in scene.said()
    scene.start()


def disk_filled(scene: Scene) -> None:
    """Something else takes all room on the disk of the run, and gives it back."""
    filler = scene.run / "filler"
    with filler.open("wb", buffering=0) as file:
        while written(file.fileno(), bytes(100_000)):
            pass
    assert scene.ends() == 2, scene.said()[-2000:]
    assert "disk is full" in scene.said() or "No space left" in scene.said()
    filler.unlink()
    scene.start()


def written(descriptor: int, data: bytes) -> bool:
    """Return whether there was room for any of it."""
    try:
        return os.write(descriptor, data) > 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


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


def node_replaced(scene: Scene) -> None:
    """A machine with a worker on it is gone, and another comes when the run has gone on."""
    node_lost(scene)
    scene.reaches(scene.farthest + 1)
    assert scene.nodes is not None
    scene.nodes.add()


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    happens: Callable[[Scene], None]
    sees: str
    """What the user does, or need not do."""
    changes: tuple[str, ...] = ()
    nodes: int = 0
    """Machines of a CPU each that it runs on, beside a head; 0 is a private cluster."""
    disk: int | None = None
    """Bytes of the run directory's disk, where it has its own."""


_ELASTIC = ("cluster.min_workers=1",)
FAULTS: dict[str, Fault] = {
    "worker killed": Fault(worker_killed, "goes on by itself"),
    "mixture controller killed": Fault(controller_killed, "goes on by itself"),
    "block plane killed": Fault(plane_killed, "goes on by itself"),
    "worker, controller and plane killed": Fault(all_actors_killed, "goes on by itself"),
    "Ray Train's controller killed": Fault(train_controller_killed, "same command again"),
    "driver killed": Fault(driver_killed, "same command again"),
    "node lost": Fault(node_lost, "goes on by itself on another node", nodes=3),
    "node lost, none to spare": Fault(
        node_lost, "goes on by itself with one worker (cluster.min_workers=1)", _ELASTIC, nodes=2
    ),
    "node lost, another comes": Fault(
        node_replaced,
        "goes on by itself, with two workers again in the end",
        _ELASTIC,
        nodes=2,
    ),
    "raylet killed": Fault(raylet_killed, "an error that says so; same command again"),
    "Ray's head killed": Fault(gcs_killed, "an error that says so; same command again"),
    "every process killed": Fault(machine_lost, "same command again"),
    "Ctrl-C": Fault(interrupted, "a checkpoint, exit code 130; same command again"),
    "preemption notice (SIGTERM)": Fault(preempted, "a checkpoint, exit code 130; again"),
    "checkpoint cut short": Fault(checkpoint_cut, "goes on from the one before"),
    "metrics cut in a line": Fault(metrics_cut, "same command again"),
    "shard found corrupt at the start": Fault(
        shard_corrupted, "exit code 2 and its name; again once mended"
    ),
    "shard turns corrupt under way": Fault(
        shard_corrupted_under_way, "exit code 2 and its name; again once mended"
    ),
    "disk full": Fault(
        disk_filled, "exit code 2 and where; again once there is room", disk=SMALL_DISK
    ),
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
    """The longest time after the fault without a step that had not been done before."""
    repeated: int
    """Steps done again."""
    differing: int
    """Steps whose batch is not that of the run that nothing happened to, missing ones included."""
    tokens: dict[str, int]
    """By domain, tokens read beyond (or short of) that run's."""
    loss: float
    """Greatest relative difference of a step's loss."""


def endure(shell: Shell, run: str, fault: Fault, at: int, expected: Path) -> Ending:
    """Return what comes of a fault after step `at` of a run that is named, nearly, `run`."""
    name = re.sub(r"\W+", "-", run)
    with ExitStack() as stack:
        nodes = stack.enter_context(Nodes.up(fault.nodes)) if fault.nodes else None
        if nodes is not None:
            shell = replace(shell, address=nodes.cluster.address)
        if fault.disk is not None:
            stack.enter_context(small_disk(shell.cwd / "runs" / name, fault.disk))
        scene = Scene(shell, name, fault.changes, nodes)
        stack.callback(scene.close)
        scene.start()
        scene.reaches(at)
        assert not scene.ended, scene.said()[-3000:]
        before = scene.farthest
        scene.begin_watch()
        fault.happens(scene)
        assert scene.ends() == 0, scene.said()[-3000:]
    assert "Traceback" not in scene.said(), scene.said()[-3000:]
    return compared(scene, expected, at=before)


def compared(scene: Scene, expected: Path, *, at: int) -> Ending:
    """Return how a run that was disturbed differs from one that was not."""
    mine, theirs = steps_of(scene.run), steps_of(expected)
    by_step = {line["step"]: line for line in mine}
    assert len(by_step) == len(mine), "a step is in the metrics twice"
    same = [line for line in theirs if by_step.get(line["step"], {}).get("batch_hash") ==
            line["batch_hash"]]  # fmt: skip
    read, due = totals(mine), totals(theirs)
    return Ending(
        at=at,
        recovered_s=scene.longest_s,
        repeated=scene.repeated,
        differing=max(len(theirs), len(mine)) - len(same),
        tokens={name: read.get(name, 0) - due.get(name, 0) for name in read.keys() | due.keys()},
        loss=max(abs(by_step[line["step"]]["loss"] - line["loss"]) / line["loss"] for line in same),
    )


def totals(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Return tokens read by domain."""
    tokens_by_domain: dict[str, int] = {}
    for line in lines:
        for name, tokens in line["counts"].items():
            tokens_by_domain[name] = tokens_by_domain.get(name, 0) + tokens
    return tokens_by_domain
