"""`train.compile` against eager: steps, losses, and what recompiling costs.

Both train the same llama on the same batches, step by step in turn, in one process without Ray: on
a CPU a small one, on a GPU one of 0.1 billion parameters in bf16. Packed rows have a new layout of
documents in every batch, which is where a compiler that specializes on values would compile again;
the compilations after the first step are counted.

    python -m tests.benchmarks.compile [--steps 40] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from raymix.recipe import ConfigModel, TrainConfig
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import IGNORED, PackedLoss
from raymix.training.model.optim import build_optimizer
from raymix.training.model.parallel import World, place_model
from tests.benchmarks._report import print_table, ratio_spread, row, write_results

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROWS, LENGTH, VOCAB = (8, 1024, 32_000) if ON_GPU else (8, 256, 512)
GPU_SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}
CPU_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WARM_UP = 5


class Loop:
    """A training step, compiled or not, over batches of its own."""

    def __init__(self, *, compile_model: bool) -> None:
        config = TrainConfig(steps=1, lr=1e-3, compile=compile_model)
        facts = CorpusFacts(VOCAB, VOCAB - 1, LENGTH)
        model = build_model(ConfigModel(config=GPU_SHAPE if ON_GPU else CPU_SHAPE), facts, seed=0)
        loss = PackedLoss(model, linear_head=True)
        self.replica = place_model(loss, config, World(device=DEVICE), bf16=ON_GPU)
        self.optimizer = build_optimizer(self.replica.model, config, sharded=False)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        """Return the seconds of a step and its loss in nats per token."""
        start = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            loss, _ = self.replica.module(*batch)
        (loss / batch[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.replica.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Reading the loss waits for the device.
        mean = float(loss.detach()) / batch[0].numel()
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start, mean


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, positions and labels of a batch: documents of other lengths in each."""
    generator = np.random.default_rng([3, step])
    tokens = torch.from_numpy(np.cumsum(generator.integers(0, 3, (ROWS, LENGTH)), 1) % VOCAB)
    starts = generator.random((ROWS, LENGTH)) < 1 / 60
    starts[:, 0] = True
    offsets = np.arange(LENGTH)
    first = np.maximum.accumulate(np.where(starts, offsets, 0), axis=1)
    labels = tokens.roll(-1, dims=1)
    labels[torch.from_numpy(np.roll(starts, -1, axis=1))] = IGNORED
    return tokens.to(DEVICE), torch.from_numpy(offsets - first).to(DEVICE), labels.to(DEVICE)


def one_repeat(steps: int) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = Loop(compile_model=False), Loop(compile_model=True)
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    losses: dict[str, list[float]] = {"eager": [], "compiled": []}
    graphs_first = 0
    for step in range(steps):
        batch = batch_of(step)
        for name, loop in (("eager", eager), ("compiled", compiled)):
            took, loss = loop.step(batch)
            seconds[name].append(took)
            losses[name].append(loss)
        if not step:
            graphs_first = counters["stats"]["unique_graphs"]
    return {
        **{name: statistics.median(each[WARM_UP:]) for name, each in seconds.items()},
        "first": seconds["compiled"][0],
        "warm_up": sum(seconds["compiled"][:WARM_UP]),
        "graphs": graphs_first,
        "recompiled": counters["stats"]["unique_graphs"] - graphs_first,
        "loss_error": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "loss": losses["eager"][-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    repeats = [one_repeat(arguments.steps) for _ in range(arguments.repeats)]

    def each(name: str) -> list[float]:
        return [float(repeat[name]) for repeat in repeats]

    ratio, spread = ratio_spread(each("compiled"), each("eager"))
    gain = statistics.median(each("eager")) - statistics.median(each("compiled"))
    rows = [
        row("step, eager", 1e3 * statistics.median(each("eager")), "ms"),
        row("step, compiled", 1e3 * statistics.median(each("compiled")), "ms",
            ratio=ratio, spread=spread, baseline="step, eager"),
        row("first step, compiled", statistics.median(each("first")), "s"),
        row(f"first {WARM_UP} steps, compiled", statistics.median(each("warm_up")), "s"),
        row("graphs in the first step", statistics.median(each("graphs")), "graphs"),
        row("graphs compiled later", max(each("recompiled")), "graphs"),
        row("largest difference of a loss", max(each("loss_error")), "nats"),
        row("loss at the end, eager", statistics.median(each("loss")), "nats"),
    ]  # fmt: skip
    if gain > 0:
        paid = statistics.median(each("warm_up")) / gain
        rows.append(row("steps until compiling has paid", paid, "steps"))
    print_table(rows)
    write_results("compile", rows)


if __name__ == "__main__":
    main()
