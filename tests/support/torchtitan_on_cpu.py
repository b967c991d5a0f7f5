"""torchtitan's own Trainer on a CPU, with a raymix recipe; a script of its tests.

    python torchtitan_on_cpu.py STEPS KILLED_AT CHANGED_AT

torchtitan 0.3.0 trains on GPUs alone: it asks CUDA for its device, imports triton, and attends by
FlexAttention, whose backward pass torch has on no CPU. Here a CPU answers in place of the device,
attention takes the same mask as a matrix, and ranks talk by gloo. Trainer, optimizer, checkpoints
and the data loader are torchtitan's and ours, unchanged. Prints a line per trained step: the step,
the hash of the batch that our loader says it was, and the share of its first domain. After step
CHANGED_AT the first domain is given all of the mixture.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention


class Triton(types.ModuleType):
    """In place of the compiler of kernels that a CPU never runs."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **_: args[0] if args and callable(args[0]) else lambda f: f


class Cpu:
    """`torch.cpu`, with the functions that torchtitan asks of a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=1 << 34)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """There are no such statistics of a CPU."""

    def empty_cache(self) -> None:
        """There is no cache on a CPU."""


def attention(q: Any, k: Any, v: Any, **given: Any) -> tuple[Any, None]:
    """Return what FlexAttention returns, by the mask as a matrix."""
    mask_mod = given["block_mask"].mask_mod
    mask = create_mask(mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    group = given["enable_gqa"]
    out = scaled_dot_product_attention(q, k, v, mask, scale=given["scale"], enable_gqa=group)
    return out, None


def prepare() -> None:
    """Make torchtitan train on this CPU; before anything else of it is imported."""
    from torchtitan.tools import utils

    utils.device_type, utils.device_module = "cpu", Cpu()
    utils.get_local_device = lambda *args: torch.device("cpu")
    names = ("triton", "triton.language")
    for name in names:
        sys.modules[name] = Triton(name)
    sys.modules["triton.language"].constexpr = type(
        "constexpr", (), {"__init__": lambda self, value: None}
    )
    sys.modules["triton"].language = sys.modules["triton.language"]
    import torchtitan.distributed.minimal_async_ep.kernels  # noqa: F401 - with this triton

    # torch asks later whether there is one.
    for name in names:
        del sys.modules[name]
    from torchtitan.models.common.attention import FlexAttention

    FlexAttention._compiled_flex_attn = staticmethod(attention)
    # Of torch versions after ours.
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda timeout, group: None


def main(steps: int, killed_at: int, changed_at: int) -> None:
    """Train the recipe `my.yaml` with torchtitan's small llama."""
    prepare()
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from raymix.integrations.torchtitan import MixtureDataLoader

    config = llama3_debugmodel()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.dataloader = MixtureDataLoader.Config(recipe="my.yaml")
    config.training.seq_len = 64
    config.training.local_batch_size, config.training.global_batch_size = 3, 6
    config.training.steps = steps
    config.training.disable_cuda_graphs = True
    config.checkpoint.enable, config.checkpoint.interval = True, 5
    config.dump_folder = "out"
    config.validator.enable = False
    # The default wants a later torch with several ranks.
    config.parallelism.spmd_backend = "partial_dtensor"
    config.hf_assets_path = str(Path("corpus", "tokenizer"))
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        # Gloo knows sums alone.
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    train_step = trainer.train_step

    def observed(*args: Any, **options: Any) -> None:
        train_step(*args, **options)
        mixture = trainer.dataloader.mixture
        info = mixture.info(trainer.step - 1)
        names = list(info.shares)
        print("trained", trainer.step, info.batch_hash, info.shares[names[0]], flush=True)
        if trainer.step == changed_at:
            mixture.set_weights(dict.fromkeys(names, 0.0) | {names[0]: 1.0})
        if trainer.step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.train_step = observed
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
