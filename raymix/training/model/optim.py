"""The optimizer and its parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from raymix.errors import RecipeError
from raymix.recipe.training import TrainConfig
from raymix.training.model.muon import MuonWithAdamW, hidden_matrices, muon_class
from raymix.training.model.optimizer_class import decays_weights, optimizer_arguments


def decay_groups(model: nn.Module, weight_decay: float | None) -> list[dict[str, Any]]:
    """Return two groups of parameters: matrices and embeddings decay, biases and norms do not.

    With None, for an optimizer without weight decay, there is one group.
    """
    # By dimension and not by name, so it holds for any architecture.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay is None:
        return [{"params": parameters}]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: TrainConfig, *, sharded: bool
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the trainable parameters of `model`.

    Args:
        model: The model, wrapped or not.
        config: The recipe's `train`.
        sharded: Whether the parameters are DTensors (FSDP2).

    Raises:
        RecipeError: If there is no such optimizer, or it refuses its arguments.
    """
    kind, arguments = optimizer_arguments(config)
    # The fused kernel does not take DTensors on a CPU, nor goes with `foreach`; None leaves the
    # choice to torch.
    allowed = next(model.parameters()).is_cuda or not sharded
    fused = True if allowed and "foreach" not in arguments else None
    adamw: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "fused": fused,
    }
    try:
        if config.optimizer == "adamw":
            groups = decay_groups(model, config.weight_decay)
            return torch.optim.AdamW(groups, **{**adamw, **arguments})
        if config.optimizer == "muon":
            return _muon(model, config, arguments, adamw)
        decay = config.weight_decay if decays_weights(config) else None
        build: Any = kind
        return build(decay_groups(model, decay), **arguments)
    # Classes check their values, each by exceptions of its own.
    except Exception as error:
        options = config.optimizer_options
        path = "train.optimizer_options" if options else "train.optimizer"
        problem = f"{kind.__name__} refuses its arguments: {error}"
        raise RecipeError.at(path, options or config.optimizer, problem) from error


def _muon(
    model: nn.Module, config: TrainConfig, arguments: dict[str, Any], adamw: dict[str, Any]
) -> MuonWithAdamW:
    hidden = hidden_matrices(model)
    own = {id(parameter) for parameter in hidden}
    groups = [
        {**group, "params": [p for p in group["params"] if id(p) not in own]}
        for group in decay_groups(model, config.weight_decay)
    ]
    groups = [group for group in groups if group["params"]]
    build: Any = muon_class()
    return MuonWithAdamW(
        build(hidden, weight_decay=config.weight_decay, **arguments) if hidden else None,
        torch.optim.AdamW(groups, **adamw) if groups else None,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups of `optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[torch.Tensor], clip_norm: float | None) -> torch.Tensor:
    """Clip gradients to `clip_norm`, and return the global norm before (a scalar on the device).

    With None the gradients are unchanged; the norm is measured all the same.
    """
    tensors = [parameter for parameter in parameters if parameter.grad is not None]
    limit = math.inf if clip_norm is None else clip_norm
    norm = torch.nn.utils.clip_grad_norm_(tensors, limit)
    # Under FSDP2 the norm is a DTensor with a partial sum on each rank.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
