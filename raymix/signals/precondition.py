"""The metric that AdamW's steps are taken in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def adam_preconditioner(
    optimizer: torch.optim.Optimizer,
) -> Callable[[nn.Parameter], Tensor | None]:
    """Return a function that gives 1 / (sqrt(v) + eps) of a parameter, None before its first step.

    `v` is the bias-corrected second moment of Adam (Kingma and Ba 2015, algorithm 1), so that
    <g, P g'> is what a step along one gradient does to the loss of the other.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def precondition(parameter: nn.Parameter) -> Tensor | None:
        state, group = optimizer.state.get(parameter), groups.get(id(parameter))
        if not state or group is None or "exp_avg_sq" not in state:
            return None
        corrected = 1 - group["betas"][1] ** float(state["step"])
        return 1 / ((state["exp_avg_sq"] / corrected).sqrt() + group["eps"])

    return precondition
