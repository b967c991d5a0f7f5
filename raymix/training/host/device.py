"""The device of a rank: peak FLOP/s, threads, seeds, and the log levels of libraries."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import torch

from raymix.training.host.machine import cores
from raymix.training.model.parallel import World

# Dense bf16 FLOP/s from the vendors' data sheets (without sparsity). A name matches the first key
# that it contains, so longer keys stand before their prefixes ("H100 PCIe" before "H100").
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
    """Return the peak bf16 FLOP/s of a GPU; None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def use_threads(threads: int | None, world: World) -> None:
    """Set torch's threads to `threads`, or by default to this rank's share of the cores."""
    # torch would take all cores in every rank, and their threads would compete.
    share = max(1, cores() // max(1, world.local_size))
    torch.set_num_threads(threads or share)


def seed_everything(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed dropout from the step, so that a resumed run repeats the steps of an unbroken one."""
    # SeedSequence mixes: seeds that differ in one bit would give correlated streams.
    mixed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(mixed)
    # Not `torch.manual_seed`, which would also seed every other GPU of the machine.
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


def quiet_libraries() -> None:
    """Suppress advice and progress bars of libraries; errors still show."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # Users cannot act on announced changes of torch and transformers; the tests show them to us.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
