"""Private API of PyTorch, read in torch 2.13; torch 2.9 to 2.11 have the same."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which tensors have shapes and dtypes but no memory.

    Activations of a model of any size are counted this way. The `meta` device alone would not do:
    models build masks and positions from real tensors, which must be allowed among fake ones.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def step_unless(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """Take a step of a fused optimizer, unless `skip`, a scalar on the device, is true.

    The fused kernels read `found_inf`, by which `torch.amp.GradScaler` has them leave out a step
    whose gradients overflowed. The decision stays on the device: the host need not wait for it.
    """
    state: Any = optimizer
    state.grad_scale, state.found_inf = None, skip.float()
    try:
        optimizer.step()
    finally:
        del state.grad_scale, state.found_inf
