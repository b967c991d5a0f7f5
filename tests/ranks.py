"""Two ranks over gloo without Ray, in a process of their own, forked before torch has threads."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raymix.train.parallel import World


def on_two_ranks(work: Callable[[World, Path], Any]) -> None:
    """Do `work` on two ranks, given the world and a directory; rank 0's answer is kept.

    For the `__main__` of a test module that `found_by_two_ranks` runs.
    """
    out = Path(sys.argv[1])
    for module in ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.llama"):
        importlib.import_module(module)  # once, for both
    child = os.fork()
    rank = 0 if child else 1
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(out.with_suffix(".store")), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = work(World(rank=rank, size=2, neighbours=2), out.parent)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank:
        os._exit(0)
    torch.save(found, out)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def found_by_two_ranks(module: str, directory: Path) -> Any:
    """Return what rank 0 of the two ranks of a test module found."""
    out = directory / "found.pt"
    command = [sys.executable, "-m", module, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)
