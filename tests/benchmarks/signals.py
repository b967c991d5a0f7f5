"""What gradient statistics cost: a recorded step against a plain one and against K + 1 passes.

`python -m tests.benchmarks.signals [--device cuda] [--groups 8 32 128] [--repeats 3] [--uneven]`.
Tokens are drawn at random: what they say does not change what the products cost. Every row of a
table is timed in turn, repeat by repeat; extra memory is what a recorded step holds at its peak
beyond what a plain one does.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from raymix.recipe import ConfigModel
from raymix.signals import GradientProbe, assign_pieces, order_by_piece
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import build_model
from raymix.training.model.loss import IGNORED, PackedLoss
from tests.benchmarks._report import print_table, ratio_spread, row, write_results

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "config": {
            "hidden_size": 320,
            "intermediate_size": 896,
            "num_hidden_layers": 6,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "tie_word_embeddings": True,
        },
        "vocab": 8192,
        "length": 256,
        "rows_per_piece": 1,
    },
    "cuda": {
        "config": {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "tie_word_embeddings": True,
        },
        "vocab": 32_000,
        "length": 512,
        "rows_per_piece": 1,
    },
}


class Bench:
    """A model, its optimizer and one batch that holds every piece."""

    def __init__(self, device: str, groups: int, *, rows_per_piece: int, even: bool) -> None:
        size = SIZES[device]
        vocab, length = size["vocab"], size["length"]
        torch.manual_seed(0)
        model = build_model(
            ConfigModel(config=size["config"]), CorpusFacts(vocab, 0, length), seed=0
        )
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.groups, self.device = groups, device
        self.loss = PackedLoss(model, linear_head=True, logit_bytes=1 << 40).to(device)
        self.optimizer = torch.optim.AdamW(self.loss.parameters(), lr=1e-5, fused=True)
        group_B = torch.arange(groups).repeat_interleave(2 * rows_per_piece)
        if not even:  # as many rows, but a quarter of them in one group
            group_B[: len(group_B) // 4] = groups - 1
        piece_B = assign_pieces(group_B, n_groups=groups)
        piece_B = piece_B[order_by_piece(piece_B)]
        self.piece_B = piece_B.to(device)
        tokens = torch.randint(0, vocab, (len(piece_B), length))
        labels = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        positions = torch.arange(length).repeat(len(piece_B), 1)
        self.batch = tuple(part.to(device) for part in (tokens, positions, labels))
        self.tokens = tokens.numel()
        self.scale = 1.0 / int((labels >= 0).sum())
        self.probe = GradientProbe(self.loss, n_groups=groups)
        self.last = GradientProbe(self.loss, n_groups=groups, mode="last_layer")

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def backward(self, rows: slice = slice(None)) -> None:
        with self.precision():
            loss, _ = self.loss(*(part[rows] for part in self.batch))
        (loss * self.scale).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def plain(self) -> None:
        self.backward()
        self.update()

    def passes(self) -> None:
        """A training step, then a pass per group over its rows: K + 1 backward passes."""
        self.plain()
        for group in range(self.groups):
            own = slice(
                len(self.piece_B) * group // self.groups,
                len(self.piece_B) * (group + 1) // self.groups,
            )
            self.backward(own)
            self.optimizer.zero_grad(set_to_none=True)

    def recorded(self) -> None:
        with self.probe.recording(self.piece_B, scale=self.scale) as recording:
            self.backward()
        self.update()
        _ = recording.pieces

    def measured(self) -> None:
        with self.precision():
            self.probe.measure(*self.batch, self.piece_B)

    def last_layer(self) -> None:
        with self.precision():
            self.last.measure(*self.batch, self.piece_B)

    def seconds(self, work: Callable[[], None]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self, work: Callable[[], None]) -> float:
        """Return the most bytes held during `work`, those held before among them."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return float(torch.cuda.max_memory_allocated())
        return _peak_rss(work)


def _peak_rss(work: Callable[[], None]) -> float:
    page, statm = resource.getpagesize(), Path("/proc/self/statm")
    done, most = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], int(statm.read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return float(most[0])


def memory(bench: Bench, label: str) -> list[dict[str, Any]]:
    """Return what recording holds beyond a plain step; before anything else was run.

    The probe keeps its buffer, so what came before counts, too.
    """
    bench.plain()
    plain = bench.peak(bench.plain)
    more = max(0.0, max(bench.peak(bench.recorded) for _ in range(2)) - plain)
    return [
        row(f"peak memory, plain step, {label}", plain / 1e6, "MB"),
        row(f"extra peak memory, recorded step, {label}", more / 1e6, "MB"),
    ]


def table(bench: Bench, label: str, repeats: int, *, all_ways: bool) -> list[dict[str, Any]]:
    works: dict[str, Callable[[], None]] = {"plain step": bench.plain}
    if all_ways:
        works["K+1 passes"] = bench.passes
    works["recorded step"] = bench.recorded
    works["own probe batch"] = bench.measured
    if all_ways:
        works["own probe batch, last layer"] = bench.last_layer
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks = memory(bench, label)
    for work in works.values():
        work()  # warm up
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(bench.seconds(work))
    rows = []
    for name, spent in seconds.items():
        ratio, spread = ratio_spread(spent, seconds["plain step"])
        rows.append(
            row(
                f"{name}, {label}",
                statistics.median(spent) * 1e3,
                "ms",
                ratio=None if name == "plain step" else ratio,
                spread=None if name == "plain step" else spread,
                baseline=None if name == "plain step" else f"plain step, {label}",
            )
        )
    return rows + peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--groups", type=int, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--uneven", action="store_true", help="a quarter of the rows in one group")
    args = parser.parse_args()
    groups = args.groups or ([8] if args.device == "cpu" else [8, 32, 128])
    each = SIZES[args.device]["rows_per_piece"]
    rows = []
    for number in groups:
        bench = Bench(args.device, number, rows_per_piece=each, even=not args.uneven)
        if not rows:
            rows.append(row("parameters", bench.parameters / 1e6, "M"))
            rows.append(row("tokens per group and step", bench.tokens / number, "tokens"))
        label = f"K = {number}" + (", uneven rows" if args.uneven else "")
        rows += table(bench, label, args.repeats, all_ways=not args.uneven)
        del bench
    print_table(rows)
    write_results("signals", rows)


if __name__ == "__main__":
    main()
