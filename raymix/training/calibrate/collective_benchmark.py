"""What gathering keys and values costs: measured in processes of their own, over gloo or NCCL."""

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
    """Return seconds of an all-gather and a reduce-scatter by team width and tokens.

    Args:
        ranks: Processes; on GPUs one for each.
        device: "cpu" or "cuda".
        widths: Ranks of the teams; teams lie side by side and gather at once.
        sizes: Tokens sharded over a team.
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
            raise ScheduleError.at(
                "ranks", ranks, f"they could not gather from each other: {last}"
            ) from error
        rows: list[tuple[int, int, float]] = json.loads(out.read_text())
    return {(width, tokens): seconds for width, tokens, seconds in rows}


def _rank(rank: int, task: _BenchmarkTask) -> None:
    """Measure as one of the processes; rank 0 writes what it found."""
    torch.set_num_threads(1)
    ranks, device, out = task.ranks, task.device, task.out
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    store = dist.FileStore(f"{out}.store", ranks)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks
    )
    dtype = torch.bfloat16 if task.bf16 else torch.float32
    times: dict[tuple[int, int], float] = {}
    for width in task.widths:
        begins = range(0, ranks - width + 1, width)
        # Every process makes every group, or they would wait for each other.
        groups = {first: dist.new_group(list(range(first, first + width))) for first in begins}
        first = rank // width * width
        for tokens in task.sizes:
            part = torch.zeros(-(-tokens // width), task.row, dtype=dtype, device=place)
            seconds = _timed(_exchange(part, width, groups.get(first)), place)
            times[width, tokens] = seconds
    if rank == 0:
        rows = [(width, tokens, seconds) for (width, tokens), seconds in times.items()]
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _exchange(part: torch.Tensor, width: int, group: Any) -> Callable[[], None]:
    """Return what a team does for one layer; nothing for a rank that is left over."""
    whole = part.new_empty(width * part.shape[0], part.shape[1])
    # Torch 2.13 renames these two; older versions know the old names only.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def run() -> None:
        if group is not None:
            gather(whole, part, group=group)
            scatter(part, whole, group=group)

    return run


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Return the median seconds of some repeats, all processes beginning together."""
    seconds = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
