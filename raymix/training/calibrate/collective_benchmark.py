"""Benchmark of the collectives of context parallelism, over gloo or NCCL.

One process per rank: a process group needs them, and the caller may have one of its own.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from raymix.errors import ScheduleError

# Collectives vary more than kernels, as they wait for the slowest rank.
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _BenchmarkTask:
    ranks: int
    device: str
    widths: tuple[int, ...]
    sizes: tuple[int, ...]
    row: int
    bf16: bool
    out: str


def benchmark_collectives(
    ranks: int,
    device: str,
    *,
    widths: Sequence[int],
    sizes: Sequence[int],
    row: int,
    bf16: bool = False,
) -> dict[tuple[int, int], float]:
    """Return the seconds of an all-gather and a reduce-scatter, by group width and tokens.

    Args:
        ranks: Processes; on GPUs one per GPU.
        device: "cpu" or "cuda".
        widths: Ranks of a group; all groups of a width run at once, as in training.
        sizes: Tokens sharded over a group.
        row: Values per token: keys and values of one layer.
        bf16: Whether values are bfloat16.

    Raises:
        ScheduleError: If a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="raymix-calibrate-") as directory:
        out = Path(directory) / "times.json"
        task = _BenchmarkTask(
            ranks=ranks,
            device=device,
            widths=tuple(widths),
            sizes=tuple(sizes),
            row=row,
            bf16=bf16,
            out=str(out),
        )
        try:
            torch.multiprocessing.spawn(_rank, args=(task,), nprocs=ranks)
        except (
            torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException,
        ) as error:
            last = str(error).strip().splitlines()[-1]
            raise ScheduleError.at("ranks", ranks, f"they could not communicate: {last}") from error
        rows: list[tuple[int, int, float]] = json.loads(out.read_text())
    return {(width, tokens): seconds for width, tokens, seconds in rows}


def _rank(rank: int, task: _BenchmarkTask) -> None:
    """Run the benchmark as one of the processes; rank 0 writes the times."""
    # Ranks share the cores; threads of a copy in memory would disturb each other.
    torch.set_num_threads(1)
    ranks, device, out = task.ranks, task.device, task.out
    rank_device = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(rank_device)
    # A file needs no free port and opens none.
    store = dist.FileStore(f"{out}.store", ranks)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks
    )
    dtype = torch.bfloat16 if task.bf16 else torch.float32
    times: dict[tuple[int, int], float] = {}
    for width in task.widths:
        first_ranks = range(0, ranks - width + 1, width)
        # `new_group` is a collective of all processes, also of those outside the group.
        groups = {first: dist.new_group(list(range(first, first + width))) for first in first_ranks}
        first = rank // width * width
        for tokens in task.sizes:
            shard = torch.zeros(-(-tokens // width), task.row, dtype=dtype, device=rank_device)
            seconds = _time(_exchange(shard, width, groups.get(first)), rank_device)
            times[width, tokens] = seconds
    if rank == 0:
        rows = [(width, tokens, seconds) for (width, tokens), seconds in times.items()]
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _exchange(shard: torch.Tensor, width: int, group: Any) -> Callable[[], None]:
    """Return the collectives of one layer; they do nothing for a rank without a group."""
    gathered = shard.new_empty(width * shard.shape[0], shard.shape[1])
    # Torch 2.13 renames these two; older versions know the old names only.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def run() -> None:
        if group is not None:
            gather(gathered, shard, group=group)
            scatter(shard, gathered, group=group)

    return run


def _time(work: Callable[[], None], device: torch.device) -> float:
    """Return the median seconds of the repeats; all processes start each repeat together."""
    seconds = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        start_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    # The first repeat sets up connections.
    return statistics.median(seconds[1:])
