"""The diagonal preconditioner of AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def adam_preconditioner(
    optimizer: torch.optim.Optimizer,
) -> Callable[[nn.Parameter], Tensor | None]:
    """Return a function from a parameter to 1 / (sqrt(v) + eps), or None before its first step.

    `v` is the bias-corrected second moment of Adam (Kingma and Ba 2015, algorithm 1): <g, P g'> is
    the first-order change of one loss by a step along the gradient of the other.
    """
    # By identity: == of tensors compares elements.
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def precondition(parameter: nn.Parameter) -> Tensor | None:
        # State appears with the first step, so it is read at each call and not once.
        state, group = optimizer.state.get(parameter), groups.get(id(parameter))
        if not state or group is None or "exp_avg_sq" not in state:
            return None
        corrected = 1 - group["betas"][1] ** float(state["step"])
        return 1 / ((state["exp_avg_sq"] / corrected).sqrt() + group["eps"])

    return precondition
