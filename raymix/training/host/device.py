"""The device of a rank: which one, how many threads, how fast at best, and libraries kept quiet."""

from __future__ import annotations

import logging
import os
import warnings

import numpy as np
import torch

from raymix.training.host.machine import cores
from raymix.training.model.parallel import World

# Dense bf16 operations per second, from the makers' data sheets (without sparsity).
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the most bf16 operations per second of a GPU; None if it is no known one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def use_threads(threads: int | None, world: World) -> None:
    """Give this process `threads` threads, or its share of the machine's cores."""
    share = max(1, cores() // max(1, world.neighbors))
    torch.set_num_threads(threads or share)


def seed_everything(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed what dropout draws from, so that a step is the same whether the run was resumed."""
    mixed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


def requested_threads() -> int | None:
    """Return the threads per process that the user set by OMP_NUM_THREADS, if so."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def quiet_libraries() -> None:
    """Keep advice and progress bars of libraries out of a run's output; errors still show."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # What will change in torch and transformers is for us to read, in the tests, not for users.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
