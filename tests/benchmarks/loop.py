"""The training loop with everything on against a bare PyTorch loop on the same batches.

Ours is `raymix train` as a user runs it: Ray, controller, block plane, stream, metrics,
TensorBoard, threads; only evaluation and checkpoints lie outside the steps that are timed. The
bare loop has the same model, optimizer, batches (in memory, as tensors), precision and threads in
a process without Ray, under plain DDP where there are two workers. They take turns. On a CPU there
is a second bare loop, with what ours sets for a process (how long threads that wait spin, and that
freed memory is kept); the first has the defaults. On a CPU the model is that of the quick start;
on a GPU one of 180 M parameters in bf16.

What the loop itself costs, on a CPU, is measured apart: without Ray, in one process, where a step
of the bare loop follows each of ours. The rest is what Ray's processes take of the same cores.

    python -m tests.benchmarks.loop [--workers 1 2] [--repeats 3] [--steps 60]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn import functional

from raymix.training.launch.cluster import keep_freed_memory, thread_environment
from tests.benchmarks._report import ROOT, print_table, ratio_spread, row, write_results

QUICKSTART = ROOT / "pipelines" / "quickstart.yaml"
CACHE = ROOT / "tests" / ".cache"
WARM_UP = 12
GPU = {
    "data": {"sequence_length": 1024, "rows_per_step": 32},
    "model": {
        "type": "llama",
        "config": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 14,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    },
}


def recipe_of(workers: int, steps: int, directory: Path) -> dict[str, Any]:
    """Return the recipe: the quick start's corpus and mixture, and a model for this machine."""
    from raymix.recipe import load_recipe

    on_gpu = torch.cuda.is_available()
    document = load_recipe(QUICKSTART).model_dump(mode="json")
    if on_gpu:
        document |= GPU
    document["name"] = f"loop{workers}"
    document["corpus"]["path"] = str(CACHE / "loop-corpus")
    document["train"] |= {"steps": steps, "checkpoint_every": None, "lr": 1e-3}
    document["eval"] = {"rows_per_domain": 1}
    document["cluster"] = {"workers": workers, "gpus_per_worker": int(on_gpu)}
    document["run"] = {"dir": str(directory)}
    return document


def write(document: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def ours(recipe: Path, directory: Path) -> tuple[float, float]:
    """Return the median seconds per step of `raymix train`, and their share of waiting for data."""
    shutil.rmtree(directory, ignore_errors=True)
    run(sys.executable, "-m", "raymix", "train", str(recipe), "--no-report")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "loss" in line][WARM_UP:]
    seconds = [line["seconds"] for line in timed]
    waits = [line["seconds"] * line["data_wait"] for line in timed]
    # The median: on a shared machine a neighbor's burst makes some steps twice as long.
    return float(np.median(seconds)), sum(waits) / sum(seconds)


def bare(recipe: Path, workers: int, *, tuned: bool) -> float:
    """Return the median seconds per step of the bare loop; `tuned` with our processes' settings."""
    command = (sys.executable, "-m", __spec__.name, "--bare", str(recipe), str(workers))
    return float(run(*command, *["--tuned"] * tuned, env=thread_environment() if tuned else {}))


def run(*command: str, env: Mapping[str, str] | None = None) -> str:
    env = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def bare_main(recipe: Path, workers: int, *, tuned: bool) -> None:
    """Print the seconds per step of a bare loop of `workers` processes."""
    from raymix.training.host.machine import cores

    rank = 0
    with tempfile.NamedTemporaryFile() as store:
        if workers > 1:
            rank = 0 if os.fork() else 1
            shared = torch.distributed.FileStore(store.name, workers)
            torch.distributed.init_process_group(
                "gloo", store=shared, rank=rank, world_size=workers
            )
        torch.set_num_threads(max(1, cores() // max(1, workers)))
        if tuned:
            keep_freed_memory()
        seconds = bare_loop(recipe, rank, max(1, workers))
        if workers > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    if rank == 0:
        print(seconds)


class Bare:
    """A bare loop over batches in memory, the very ones that ours reads."""

    def __init__(self, recipe: Any, rank: int = 0, workers: int = 1) -> None:
        from raymix.store import Corpus
        from raymix.training.model.facts import CorpusFacts
        from raymix.training.model.hf_model import build_model

        corpus = Corpus.open(recipe.corpus.path)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        info = corpus.manifest.tokenizer
        facts = CorpusFacts(info.vocab_size, info.eos_id, recipe.data.sequence_length)
        self._model: Any = build_model(recipe.model, facts, seed=recipe.seed).to(self.device)
        self.batches = list(in_memory(recipe, corpus, rank, workers, self.device))
        self._called = self._model
        if workers > 1:
            self._called = torch.nn.parallel.DistributedDataParallel(self._model)
        self._workers = workers
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self._mixed: Callable[[], Any] = contextlib.nullcontext
        if self.device.type == "cuda":
            self._mixed = functools.partial(torch.autocast, "cuda", torch.bfloat16)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]) -> None:
        tokens, positions, labels, count = batch
        with self._mixed():
            out = self._called(input_ids=tokens, position_ids=positions, use_cache=False)
            loss = functional.cross_entropy(
                out.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
            )
        (loss * (self._workers / count)).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def bare_loop(path: Path, rank: int, workers: int) -> float:
    from raymix.recipe import load_recipe

    bare = Bare(load_recipe(path), rank, workers)
    seconds: list[float] = []
    # On a GPU the host runs ahead of the device, and is to be left to.
    sync = 4 if bare.device.type == "cuda" else 1
    began = time.perf_counter()
    for step, batch in enumerate(bare.batches):
        bare.step(batch)
        if step % sync == sync - 1:
            _wait(bare.device)
            now = time.perf_counter()
            seconds.append((now - began) / sync)
            began = now
    return float(np.median(seconds[WARM_UP // sync :]))


class TakingTurns:
    """A stream that has a bare loop make a step before each of ours, and times both."""

    def __init__(self, stream: Any, bare: Bare) -> None:
        self._stream, self._bare = stream, bare
        self._left = iter(bare.batches)
        self.marks: list[float] = []
        """When a step of ours ended, when a bare one ended, and so on."""

    def next(self) -> Any:
        self.marks.append(time.perf_counter())
        self._bare.step(next(self._left))
        self.marks.append(time.perf_counter())
        return self._stream.next()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def turns_main(path: Path) -> None:
    """Print the seconds per step of our loop and of the bare one, in one process without Ray."""
    from raymix.recipe import load_recipe
    from raymix.training.job import Job
    from raymix.training.loop import TrainingLoop
    from raymix.training.model.parallel import World
    from raymix.training.run.rundir import RunDirectory
    from raymix.training.setup import build_components, local_source, resume

    recipe, world = load_recipe(path), World()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        run, steps = RunDirectory(Path(directory)), recipe.train.steps
        job = Job(recipe, run, steps, recipe.data.rows_per_step, False, None, "bench")
        parts = build_components(
            job,
            world,
            resume(job, world),
            source=local_source(recipe),
            on_checkpoint=lambda path, step: None,
            stop_requested=lambda: False,
        )
        turns = TakingTurns(parts.stream, Bare(recipe))
        TrainingLoop(dataclasses.replace(parts, stream=turns)).run()  # type: ignore[arg-type] # acts as one
    took = np.diff(turns.marks)[2 * WARM_UP :]
    print(json.dumps([took[1::2].tolist(), took[0:-1:2].tolist()]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_memory(
    recipe: Any, corpus: Any, rank: int, workers: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Yield the very batches that ours reads, as tensors, with the labels of the whole batch."""
    from raymix.training.step.batches import micro_batches

    stream = local_stream(recipe, corpus, rank, workers)
    for _ in range(recipe.train.steps):
        batch = stream.next()
        (micro,) = micro_batches(batch, 1, device)
        yield micro.tokens_BL, micro.positions_BL, micro.labels_BL, batch.label_tokens


def local_stream(recipe: Any, corpus: Any, rank: int = 0, workers: int = 1) -> Any:
    from raymix.streaming.batches.stream import MixtureStream, row_tokens
    from raymix.streaming.blocks.sources import LocalSource
    from raymix.streaming.controller.build import build_mixture_state
    from raymix.streaming.controller.local import LocalController
    from raymix.training.plan.mixer_context import mixer_context

    context = mixer_context(recipe, corpus, steps=recipe.train.steps)
    return MixtureStream(
        corpus,
        recipe.data,
        seed=recipe.seed,
        rank=rank,
        world_size=workers,
        controller=LocalController(build_mixture_state(recipe.mixer, context)),
        source=LocalSource(corpus, row_tokens=row_tokens(recipe.data)),
    )


def parts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what each part of a step costs by itself, one worker, without Ray but for the RPC."""
    from raymix.recipe import load_recipe
    from raymix.store import Corpus
    from raymix.training.model.parallel import World
    from raymix.training.run.event_file import EventFileWriter
    from raymix.training.run.recorder import Recorder
    from raymix.training.run.rundir import RunDirectory
    from raymix.training.step.batches import micro_batches
    from raymix.training.step.metrics import StepMetrics

    recipe = load_recipe(path)
    corpus = Corpus.open(recipe.corpus.path)
    stream, world = local_stream(recipe, corpus), World()
    yield _part("stream next(), blocks at hand", stream.next)
    batch = stream.next()
    yield _part("batch to tensors", lambda: list(micro_batches(batch, 1, world.device)))
    (micro,) = micro_batches(batch, 1, world.device)
    losses = torch.zeros(micro.tokens_BL.shape)

    def add_up() -> None:
        metrics = StepMetrics(len(corpus.domain_names), world)
        metrics.add(micro, batch.domain_rows, losses)
        metrics.start(checkpoint=False, stop=False).result()

    yield _part("metrics: sums by domain", add_up)
    with tempfile.TemporaryDirectory() as directory:
        board = EventFileWriter(Path(directory) / "tensorboard", start_step=0)
        recorder = Recorder(RunDirectory(Path(directory)), trackers=[board])
        line = _line(batch, corpus.domain_names)
        yield _part("metrics: line and TensorBoard", lambda: recorder.step(line))
        recorder.close()
        yield _checkpoint(recipe, corpus, Path(directory))
    # `--workers 0` needs no Ray, and some machines have none.
    if recipe.cluster.workers:
        yield _rpc(recipe, corpus)


def _line(batch: Any, names: tuple[str, ...]) -> dict[str, Any]:
    shares = dict(zip(names, batch.shares.tolist(), strict=True))
    counts = dict(zip(names, batch.tokens_D.tolist(), strict=True))
    numbers = {"loss": 3.123456789, "lr": 1e-3, "tokens_per_s": 1e4, "data_wait": 0.01}
    return {
        "step": 1,
        **numbers,
        "mixture_version": 0,
        "shares": shares,
        "batch_hash": batch.batch_hash,
        "counts": counts,
        "domain_loss": dict.fromkeys(names, 3.12345),
    }


def _part(name: str, work: Callable[[], object], times: int = 200) -> dict[str, Any]:
    for _ in range(5):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return row(f"part: {name}", 1e3 * (time.perf_counter() - began) / times, "ms/step")


def _checkpoint(recipe: Any, corpus: Any, directory: Path) -> dict[str, Any]:
    from raymix.training.job import Job
    from raymix.training.launch.local import run_in_process
    from raymix.training.run.rundir import RunDirectory

    short = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"steps": 3, "checkpoint_every": 1}),
            "run": recipe.run.model_copy(update={"dir": str(directory / "run")}),
        }
    )
    run = RunDirectory(directory / "run")
    run.path.mkdir()
    job = Job(short, run, 3, recipe.data.rows_per_step, torch.cuda.is_available(), None, "bench")
    spent = run_in_process(job, stop_requested=lambda: False).seconds["checkpoint"]
    return row("part: one checkpoint", 1e3 * spent / 3, "ms")


def _rpc(recipe: Any, corpus: Any) -> dict[str, Any]:
    from raymix.recipe import ClusterConfig
    from raymix.streaming.controller.client import RemoteController, start_controller
    from raymix.training.launch.cluster import ray_cluster
    from raymix.training.plan.mixer_context import mixer_context

    with ray_cluster(ClusterConfig()):
        context = mixer_context(recipe, corpus, steps=10**6)
        handle = start_controller(recipe_mixer=recipe.mixer, context=context)
        control = RemoteController(handle, attempt="bench", rank=0, world_size=1)
        steps = iter(range(10**6))

        def lease() -> None:
            step = next(steps)
            control.request_lease(
                step=step, leased_until=step, n_steps=1, version=0 if step else -1
            )
            control.wait_lease()

        return _part("controller RPC, waited for", lease)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="0: without Ray")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--quick", action="store_true", help="one repeat of few steps: figures mean nothing"
    )
    parser.add_argument("--bare", nargs=2, metavar=("RECIPE", "WORKERS"), help=argparse.SUPPRESS)
    parser.add_argument("--turns", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare_main(Path(options.bare[0]), int(options.bare[1]), tuned=options.tuned)
        return
    if options.turns:
        turns_main(Path(options.turns))
        return
    steps, repeats = (WARM_UP + 2, 1) if options.quick else (options.steps, options.repeats)
    CACHE.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for workers in options.workers:
            document = recipe_of(workers, steps, place / "run")
            recipe = write(document, place / f"loop{workers}.yaml")
            run(sys.executable, "-m", "raymix", "prepare", str(recipe))
            rows += compare(recipe, place / "run", workers, repeats)
        if not (torch.cuda.is_available() or options.quick):
            rows += taking_turns(recipe)
        rows += parts(recipe)
    print_table(rows)
    write_results("loop", rows)


def compare(recipe: Path, directory: Path, workers: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one worker count."""
    left: list[float] = []
    right: dict[bool, list[float]] = {False: [], True: []}
    waits: list[float] = []
    for repeat in range(repeats):
        right[False].append(bare(recipe, workers, tuned=False))
        seconds, wait = ours(recipe, directory)
        right[True].append(bare(recipe, workers, tuned=True))
        left.append(seconds)
        waits.append(wait)
        print(
            f"repeat {repeat + 1}/{repeats}, {workers} workers: bare {right[False][-1]:.4f}, "
            f"with our settings {right[True][-1]:.4f}, raymix {seconds:.4f} s/step, "
            f"{100 * wait:.2f}% of it waiting for data",
            flush=True,
        )
    plural = f"{workers} worker{'s' * (workers != 1)}"
    for tuned, seconds_R in right.items():
        name = f"bare loop{' with our settings' * tuned}, {plural}"
        ratio, spread = ratio_spread(left, seconds_R)
        yield row(name, float(np.median(seconds_R)), "s/step")
        yield row(
            f"raymix train, {plural}",
            float(np.median(left)),
            "s/step",
            ratio=ratio,
            spread=spread,
            baseline=name,
        )
    yield row("  of it waiting for data", 100 * float(np.median(waits)), "%")


def taking_turns(recipe: Path) -> Iterator[dict[str, Any]]:
    """Yield what our loop itself costs: no Ray, and a machine that is the same for both sides."""
    command = (sys.executable, "-m", __spec__.name, "--turns", str(recipe))
    left, right = json.loads(run(*command, env=thread_environment()))
    pieces = [[float(np.median(p)) for p in np.array_split(side, 6)] for side in (left, right)]
    ratio, spread = ratio_spread(*pieces)
    name = "bare loop, step by step in turn with ours, one process"
    yield row(name, float(np.median(right)), "s/step")
    value = float(np.median(left))
    yield row("our loop there, no Ray", value, "s/step", ratio=ratio, spread=spread, baseline=name)


if __name__ == "__main__":
    main()
