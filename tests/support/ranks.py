"""Ranks over gloo without Ray, in a process of their own, forked before torch has threads."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raymix.training.model.parallel import World


def on_two_ranks(work: Callable[[World, Path], Any]) -> None:
    """Do `work` on two ranks; see `on_ranks`."""
    on_ranks(2, work)


def on_ranks(size: int, work: Callable[[World, Path], Any]) -> None:
    """Do `work` on each rank, given the world and a directory; rank 0's answer is kept.

    For the `__main__` of a test module that `results_of_ranks` runs.
    """
    out = Path(sys.argv[1])
    for module in ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.llama"):
        importlib.import_module(module)  # once, for all
    children, rank = [], 0
    for number in range(1, size):
        if not (child := os.fork()):
            children, rank = [], number
            break
        children.append(child)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(out.with_suffix(".store")), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    result = work(World(rank=rank, size=size, local_size=size), out.parent)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank:
        os._exit(0)
    torch.save(result, out)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def results_of_ranks(module: str, directory: Path) -> Any:
    """Return what rank 0 of the ranks of a test module found."""
    out = directory / "found.pt"
    command = [sys.executable, "-m", module, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)
