"""An hour of training with a fault every two minutes: the data order after it, and all memory.

A run on two workers of a private Ray cluster. About every two minutes something drawn happens to
it: a worker, the mixture controller, the block plane or all of them are killed, or Ray Train's
controller, or the driver; or it is interrupted, or told that its machine goes. At the end the step
lines must be 1, 2, 3 ... without gap or repetition, and every batch that of a stream that nothing
happened to. Memory is what a process holds for itself (anonymous pages), every ten seconds; a
process that is started anew begins anew, so what would show is growth from life to life or within
a long life.

    python -m tests.benchmarks.soak [--minutes 60] [--every 120]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raymix.recipe import load_recipe
from raymix.store import Corpus
from raymix.store.remote.tail import LineTail
from raymix.streaming.batches.stream import MixtureStream, row_tokens
from raymix.streaming.blocks.sources import LocalSource
from raymix.streaming.controller.build import build_mixture_state
from raymix.streaming.controller.local import LocalController
from raymix.training.plan.mixer_context import mixer_context
from tests.benchmarks._report import RESULTS, row, write_results
from tests.support import faults
from tests.support.scenes import BOUND_S, RECIPE, Hung, Scene, descendants, title_of
from tests.support.shell import Shell, write_recipe

FAULTS = {
    "worker": faults.worker_killed,
    "mixture controller": faults.controller_killed,
    "block plane": faults.plane_killed,
    "all three": faults.all_actors_killed,
    "Ray Train's controller": faults.train_controller_killed,
    "driver": faults.driver_killed,
    "Ctrl-C": faults.interrupted,
    "preemption": faults.preempted,
}
TITLES = {
    "driver": "raymix train",
    "worker": "ray::RayTrainWorker",
    "mixture controller": "ray::MixtureController",
    "block plane": "ray::BlockPlane",
    "Ray Train's controller": "ray::TrainController",
    "raylet": "raylet/raylet",
    "Ray's head": "gcs_server",
}
SAMPLE_S = 10.0
STEPS = 10_000_000


@dataclass
class Soak(Scene):
    """A run that is watched by the lines it adds, of which there are many in an hour."""

    tail: LineTail = field(init=False)

    def __post_init__(self) -> None:
        self.tail = LineTail(self.run / "metrics.jsonl")

    def step(self) -> int:
        """See `Scene`."""
        lines, afresh = self.tail.read()
        now = 0 if afresh else self.farthest
        for line in lines:
            entry = json.loads(line)
            now = entry["step"] if "loss" in entry else now
        if now < self.farthest:
            self.repeated += self.farthest - now
        self.farthest = now
        return now


@dataclass
class Samples:
    """Anonymous memory of the processes of a run, MB, and when what happened to it."""

    began: float = field(default_factory=time.monotonic)
    memory: list[tuple[str, int, float, float]] = field(default_factory=list)
    """What, process, seconds, MB."""
    events: list[tuple[float, str, int]] = field(default_factory=list)
    """Seconds, what, after which step."""

    def now(self) -> float:
        return time.monotonic() - self.began

    def take(self, scene: Scene) -> None:
        if scene.process is None or scene.ended:
            return
        for pid in (scene.process.pid, *descendants(scene.process.pid)):
            title = "driver" if pid == scene.process.pid else kind_of(pid)
            if title is not None and (megabytes := anonymous_mb(pid)) is not None:
                self.memory.append((title, pid, self.now(), megabytes))


def kind_of(pid: int) -> str | None:
    title = title_of(pid)
    return next((name for name, words in TITLES.items() if words in title), None)


def anonymous_mb(pid: int) -> float | None:
    """Return the memory that a process holds for itself, MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    fields = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(fields[0]) / 1024 if fields else None


def endure(scene: Soak, samples: Samples, *, minutes: float, every: float, seed: int) -> None:
    """Train for so long, with a fault about every so many seconds; end with a checkpoint.

    A fault waits until a new step has been done since the one before.
    """
    drawn = random.Random(seed)
    scene.start()
    sampled = 0.0
    due = every * drawn.uniform(0.5, 1.5)
    stuck = time.monotonic() + BOUND_S
    struck = most = 0
    while samples.now() < 60 * minutes:
        if scene.step() > most:
            most, stuck = scene.farthest, time.monotonic() + BOUND_S
        if time.monotonic() > stuck:
            raise Hung(f"no step for {BOUND_S:g} s\n{scene.said()[-2000:]}")
        if samples.now() - sampled >= SAMPLE_S:
            sampled = samples.now()
            samples.take(scene)
        if samples.now() >= due and most > struck and scene.pids(TITLES["worker"]):
            name = drawn.choice(list(FAULTS))
            samples.events.append((samples.now(), name, scene.farthest))
            print(f"{samples.now():6.0f} s  step {scene.farthest:7,d}  {name}", flush=True)
            FAULTS[name](scene)
            struck = most = max(most, scene.farthest)
            stuck = time.monotonic() + BOUND_S
            due = samples.now() + every * drawn.uniform(0.5, 1.5)
        if scene.ended:
            assert scene.process is not None
            samples.events.append((samples.now(), f"exit {scene.process.returncode}", 0))
            scene.start()
        time.sleep(0.5)
    scene.reaches(scene.farthest + 1)
    assert scene.ask(signal.SIGINT) == 130, scene.said()[-3000:]


def compared(scene: Scene) -> tuple[int, int]:
    """Return the steps of a run and how many of them read another batch than is due."""
    lines = [json.loads(line) for line in (scene.run / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if "loss" in line]
    assert [line["step"] for line in done] == list(range(1, len(done) + 1)), "gaps or repetitions"
    recipe = load_recipe(scene.shell.cwd / RECIPE, [f"name={scene.name}"])
    corpus = Corpus.open(scene.shell.cwd / "corpus")
    context = mixer_context(recipe, corpus, steps=STEPS)
    stream = MixtureStream(
        corpus,
        recipe.data,
        seed=recipe.seed,
        rank=0,
        world_size=1,
        controller=LocalController(build_mixture_state(recipe.mixer, context)),
        source=LocalSource(corpus, row_tokens=row_tokens(recipe.data)),
    )
    return len(done), sum(line["batch_hash"] != stream.next().batch_hash for line in done)


def growth(samples: Samples, title: str) -> tuple[float, float, float]:
    """Return the median MB of a kind of process in the first and last third, and the most.

    Of each life the first half minute is left out, in which it loads what it needs.
    """
    begun: dict[int, float] = {}
    settled: list[tuple[float, float]] = []
    for name, pid, at, megabytes in samples.memory:
        if name == title and at - begun.setdefault(pid, at) >= 30:
            settled.append((at, megabytes))
    if not settled:
        return float("nan"), float("nan"), float("nan")
    third = max(at for at, _ in settled) / 3
    early = [megabytes for at, megabytes in settled if at <= third] or [settled[0][1]]
    late = [megabytes for at, megabytes in settled if at >= 2 * third]
    return (
        statistics.median(early),
        statistics.median(late),
        max(megabytes for _, megabytes in settled),
    )


def draw(samples: Samples, path: Path) -> None:
    """Draw memory over time, a panel per kind of process, faults as lines."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    kinds = [title for title in TITLES if any(m[0] == title for m in samples.memory)]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(7, 1.3 * len(kinds)), sharex=True)
    for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
        curves: dict[int, list[tuple[float, float]]] = {}
        for name, pid, at, megabytes in samples.memory:
            if name == kind:
                curves.setdefault(pid, []).append((at / 60, megabytes))
        for curve in curves.values():
            axis.plot(*zip(*curve, strict=True), color="#0072b2", linewidth=1)
        for at, _, _ in samples.events:
            axis.axvline(at / 60, color="#bbbbbb", linewidth=0.5, zorder=0)
        axis.set_ylim(bottom=0)
        axis.set_title(kind, loc="left", fontsize=8)
        axis.tick_params(labelsize=7)
    np.atleast_1d(axes)[-1].set_xlabel("minutes (lines: faults), MB held", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=120, help="seconds between faults, about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="raymix-soak-") as directory:
        shell = Shell(Path(directory))
        # Steps of a tenth of a second and more: an hour of them fits a file and a plot.
        train = {"steps": STEPS, "lr": 1e-3, "warmup_ratio": 0, "checkpoint_every": 50}
        data = {"sequence_length": 256, "rows_per_step": 16}
        write_recipe(shell.cwd / RECIPE, train=train, data=data, cluster__max_failures=10_000)
        shell.ok("prepare", RECIPE)
        scene, samples = Soak(shell, "soak"), Samples()
        try:
            endure(scene, samples, minutes=options.minutes, every=options.every, seed=options.seed)
        finally:
            scene.close()
        steps, differing = compared(scene)
        size = sum(file.stat().st_size for file in scene.run.rglob("*") if file.is_file())
    report(samples, steps, differing, scene.repeated, size)


def report(samples: Samples, steps: int, differing: int, repeated: int, size: int) -> None:
    """Print and write what came of it."""
    counts = Counter(name for _, name, _ in samples.events)
    print(f"\n{samples.now() / 60:.0f} minutes, {sum(counts.values())} events: {dict(counts)}")
    print(f"{steps:,} steps, {repeated:,} of them done again; {differing} read another batch")
    print(f"run directory: {size / 1e6:.0f} MB\n")
    print(f"{'anonymous MB':24s}{'first third':>12s}{'last third':>12s}{'most':>8s}")
    rows: list[dict[str, Any]] = [
        row("steps", steps, "steps"),
        row("another batch", differing, "steps"),
        row("done again", repeated, "steps"),
    ]
    for title in TITLES:
        early, late, most = growth(samples, title)
        print(f"{title:24s}{early:12.0f}{late:12.0f}{most:8.0f}")
        rows.append(row(title, late, "MB", ratio=late / early, baseline="first third"))
    write_results("soak", [*rows, {"events": samples.events}])
    draw(samples, RESULTS / "soak.svg")
    print(RESULTS / "soak.svg")


if __name__ == "__main__":
    main()
