"""Training on documents of very unequal lengths, two workers that may share a document.

Nothing is simulated: two processes on this machine train a Llama with grouped-query attention on
the same batches of real text (bytes of the quick start's books, mathematics, law and chat), step by
step by the schedule of each planner. `default` is one document per micro-step, on both workers;
`packed` fills micro-steps and shares every document; `refine` is what `raymix train` does. Planners
take turns, each from the same weights, so their losses must agree to float noise: a step's largest
difference is a row of the table, and the run fails beyond 1e-4. A step's time is that of the slower
worker; its CPU time is the sum over workers. On two cores that others use, look at CPU time.

    python -m tests.benchmarks.longctx [--quick] [--steps 6] [--repeats 5] [--longest 4096]
                                       [--cost FILE]

`raymix schedule calibrate pipelines/longctx.yaml --out FILE` measures the costs to plan by; without
it `packed` and `refine` plan by assumed ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from raymix.context_parallel import ContextParallelGroups, register
from raymix.recipe import ConfigModel, TrainConfig
from raymix.schedule import Layout, Schedule, load_cost_model, plan_batch
from raymix.streaming.batches.step_batch import DocumentBatch, LocalDocument
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import PackedLoss
from raymix.training.model.optim import build_optimizer
from raymix.training.model.parallel import World, place_model
from raymix.training.step.document_layout import assumed_cost
from raymix.training.step.documents import ContextParallel, document_micro_steps
from tests.benchmarks._report import ROOT, print_table, ratio_spread, row, write_results
from tests.support.ranks import on_ranks

PLANNERS = ("default", "packed", "refine")
DOMAINS = ("books", "math", "legal", "chat")
WORKERS = 2
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    steps: int
    repeats: int
    longest: int
    """Longer documents are cut here."""
    tokens: int
    """Tokens of a step; the last document may go beyond."""
    memory: int
    """Tokens a worker can hold at once."""
    cost: str | None = None
    """File of the cost model to plan by; None: assumed."""


def documents(setting: Setting) -> list[list[np.ndarray]]:
    """Return the documents of each step, by turns from the domains, in a fixed random order."""
    generator = np.random.default_rng(1)
    texts = []
    for name in DOMAINS:
        path = ROOT / "pipelines" / "quickstart" / "train" / f"{name}.parquet"
        own = pq.read_table(path, columns=["text"])["text"].to_pylist()
        texts.append([own[at] for at in generator.permutation(len(own))])
    batches, turn = [], 0
    for _ in range(setting.steps):
        step: list[np.ndarray] = []
        while sum(map(len, step)) < setting.tokens:
            # One long document to seven short ones, about.
            own = texts[turn // 8 % 3] if turn % 8 == 0 else texts[3]
            text = own[turn // 8 % len(own) if turn % 8 == 0 else turn % len(own)]
            step.append(np.frombuffer(text.encode()[: setting.longest], np.uint8).astype(np.uint16))
            turn += 1
        batches.append(step)
    return batches


def rank_batch(schedule: Schedule, batch: list[np.ndarray], rank: int) -> DocumentBatch:
    """Return what a rank holds of a batch."""
    micro_batches = tuple(
        (
            *(LocalDocument(0, (rank,), batch[k]) for k in micro.local),
            *(LocalDocument(0, shard.ranks, batch[shard.sequence]) for shard in micro.sharded),
        )
        for micro in schedule.micro_batches(rank)
    )
    return DocumentBatch(0, 0, np.ones(1), np.zeros(1, np.int64), _Nothing(), micro_batches)


class _Nothing:
    """Facts that nobody here asks for."""

    def tokens_by_domain(self, step: int) -> Any:
        raise NotImplementedError

    def label_tokens(self, step: int) -> int:
        raise NotImplementedError

    def batch_hash(self, step: int) -> str:
        raise NotImplementedError


class Trainer:
    """One rank of a run, always from the same weights."""

    def __init__(self, world: World, setting: Setting) -> None:
        self.world = world
        self.setting = setting
        self.layout = Layout(1, WORKERS, barrier="none")
        self.how = ContextParallel(world.rank, ContextParallelGroups.of(self.layout))
        self.batches = documents(setting)

    def run(self, planner: str) -> dict[str, Any]:
        """Return wall and CPU seconds of each step, its loss, and seconds of planning."""
        facts = CorpusFacts(257, 256, self.setting.longest)
        model = build_model(ConfigModel(config=MODEL), facts, seed=1)
        model.set_attn_implementation(register())
        config = TrainConfig(steps=self.setting.steps, lr=1e-3)
        loss = PackedLoss(model, linear_head=True)
        replica = place_model(loss, config, self.world, bf16=False)
        optimizer = build_optimizer(replica.model, config, sharded=replica.sharded)
        cost = assumed_cost(model, on_gpu=False, memory_tokens=self.setting.memory)
        if self.setting.cost is not None:
            measured = load_cost_model(self.setting.cost)
            cost = replace(measured, memory_tokens=self.setting.memory)
        result: dict[str, Any] = {"wall": [], "cpu": [], "loss": [], "plan": [], "shape": []}
        for batch in self.batches:
            lengths = np.array([len(document) for document in batch])
            started = time.process_time()
            schedule = plan_batch(lengths, self.layout, cost, planner)
            result["plan"].append(time.process_time() - started)
            labels = int(lengths.sum()) - len(batch)
            mine = rank_batch(schedule, batch, self.world.rank)
            torch.distributed.barrier()
            clock, cpu = time.perf_counter(), time.process_time()
            nats = torch.zeros((), dtype=torch.float64)
            count = len(mine.micro_batches)
            for index, one in enumerate(document_micro_steps(mine, self.how, self.world.device)):
                micro = one.micro
                with replica.accumulating(last=index == count - 1), one.attending():
                    tensors = micro.tokens_BL, micro.positions_BL, micro.labels_BL
                    summed, each = replica.module(*tensors)
                    (summed * (replica.gradient_scale / labels)).backward()
                nats += each.double().sum()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            took = torch.tensor([time.perf_counter() - clock, -1.0, nats])
            took[1] = time.process_time() - cpu
            sums = took.clone().double()
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX)
            result["wall"].append(float(took[0]))
            result["cpu"].append(float(sums[1]))
            result["loss"].append(float(sums[2]) / labels)
            shared = int((schedule.placement.width_K > 1).sum())
            result["shape"].append((schedule.micro_steps, shared, len(batch)))
        return result


def on_each_rank(world: World, directory: Path) -> list[dict[str, Any]]:
    """Return what each planner's run took, repeat by repeat; the planners take turns."""
    setting = Setting(**json.loads((directory / "setting.json").read_text()))
    trainer = Trainer(world, setting)
    trainer.run("refine")  # warms up
    runs = []
    for repeat in range(setting.repeats):
        order = PLANNERS[repeat % len(PLANNERS) :] + PLANNERS[: repeat % len(PLANNERS)]
        runs.append({planner: trainer.run(planner) for planner in order})
    return runs


def table(runs: list[dict[str, Any]], setting: Setting) -> list[dict[str, Any]]:
    rows = []
    for kind, unit in (("wall", "s/step"), ("cpu", "CPU s/step")):
        took = {name: [statistics.mean(run[name][kind]) for run in runs] for name in PLANNERS}
        for name in PLANNERS:
            value = statistics.median(took[name])
            if name == "default":
                rows.append(row(f"{name}, {kind}", value, unit))
                continue
            for base in ("default", "packed"):
                if base == name:
                    continue
                ratio, spread = ratio_spread(took[name], took[base])
                rows.append(row(f"{name}, {kind}", value, unit, ratio=ratio, spread=spread,
                                baseline=f"{base}, {kind}"))  # fmt: skip
    for name in PLANNERS:
        shapes = np.array(runs[0][name]["shape"], dtype=float).mean(axis=0)
        rows.append(row(f"{name}, micro-steps", float(shapes[0]), "per step"))
        rows.append(row(f"{name}, shared documents", float(shapes[1]), f"of {shapes[2]:.0f}"))
        rows.append(
            row(f"{name}, planning", 1e3 * statistics.mean(runs[0][name]["plan"]), "CPU ms")
        )
    losses = np.array([run[name]["loss"] for run in runs for name in PLANNERS])
    rows.append(row("largest difference of a loss", float(np.ptp(losses, axis=0).max()), "nats"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--cost", help="what `raymix schedule calibrate` measured; else assumed")
    parser.add_argument("--quick", action="store_true", help="two repeats of two small steps")
    given = parser.parse_args()
    steps, repeats, longest = given.steps, given.repeats, given.longest
    if given.quick:
        steps, repeats, longest = 2, 2, min(longest, 1024)
    cost = given.cost and str(Path(given.cost).resolve())
    setting = Setting(steps, repeats, longest, tokens=3 * longest, memory=longest, cost=cost)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "found.pt"
        (out.parent / "setting.json").write_text(json.dumps(vars(setting)))
        command = [sys.executable, "-m", "tests.benchmarks.longctx", str(out)]
        subprocess.run(command, check=True, cwd=ROOT)
        runs = torch.load(out, weights_only=False)
    rows = table(runs, setting)
    print_table(rows)
    write_results("longctx", rows)
    if rows[-1]["value"] > LOSS_TOLERANCE:
        sys.exit("the planners' losses differ by more than float noise")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("found.pt"):
        on_ranks(WORKERS, on_each_rank)
    else:
        main()
