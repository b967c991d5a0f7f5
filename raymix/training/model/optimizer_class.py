"""Optimizers by name: their class and arguments, tried on a small model before a run starts.

A trial of two steps shows whether the class takes the options, needs a closure, and what state it
keeps per element of a parameter, which the memory estimate of a plan is made from.

Roles of parameters: `matrix` (of a hidden layer), `table` (embeddings, head, and more than two
axes), `vector` (norms and biases).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from raymix._utils.imports import importing_from_here
from raymix.errors import RecipeError, did_you_mean, format_problem
from raymix.recipe.training import TrainConfig
from raymix.training.model.muon import hidden_matrices, muon_class

# Large enough that a state with the parameter's number of elements is not mistaken for a scalar.
_WIDTH = 16
# Bytes per element of AdamW's two moments in float32. Also assumed of a class that runs on a GPU
# alone, where it cannot be tried.
_TWO_MOMENTS = 8.0
_JSON_TYPES = (int, float, bool, str, type(None))


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class that `train.optimizer` names; for `muon` torch's Muon.

    Raises:
        RecipeError: If there is no such class, or it is no torch Optimizer.
    """
    if name == "adamw":
        return torch.optim.AdamW
    if name == "muon":
        return muon_class()
    module_name, class_name = name.split(":")
    try:
        with importing_from_here():
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise _wrong(name, f"it cannot be imported: {error}") from error
    optimizer = getattr(module, class_name, None)
    if optimizer is None:
        problem = f"module {module_name!r} has no {class_name!r}"
        raise _wrong(name, problem, did_you_mean(class_name, vars(module)))
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise _wrong(name, "not a subclass of torch.optim.Optimizer")
    return optimizer


def optimizer_arguments(config: TrainConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the optimizer's class and its arguments but the parameters.

    Raises:
        RecipeError: If there is no such class, or it does not take an option.
    """
    kind = optimizer_class(config.optimizer)
    taken = inspect.signature(kind).parameters
    options = dict(config.optimizer_options)
    given: dict[str, Any] = {"lr": config.lr}
    if config.optimizer == "adamw":
        given |= {"betas": config.betas, "eps": config.eps}
    elif config.optimizer == "muon":
        # Updates of the size of AdamW's (Liu et al. 2025), so one rate serves both.
        given |= {"adjust_lr_fn": "match_rms_adamw"}
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in taken.values()):
        return kind, given | options
    names = [name for name in taken if name != "params"]
    if "lr" not in names:
        raise _wrong(config.optimizer, "it takes no lr, which train.schedule sets in every step")
    unknown = [
        format_problem(
            f"train.optimizer_options.{option}",
            value,
            f"not an argument of {kind.__name__}",
            allowed=did_you_mean(option, names) or f"It takes {', '.join(names)}",
        )
        for option, value in options.items()
        if option not in names
    ]
    if unknown:
        raise RecipeError(*unknown)
    return kind, given | options


def decays_weights(config: TrainConfig) -> bool:
    """Return whether the optimizer applies `train.weight_decay`."""
    taken = inspect.signature(optimizer_class(config.optimizer)).parameters
    variadic = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in taken.values())
    return variadic or "weight_decay" in taken


def parameter_elements(model: nn.Module) -> dict[str, int]:
    """Return the elements of the trainable parameters of a model by role."""
    hidden = {id(parameter) for parameter in hidden_matrices(model)}
    elements = {"matrix": 0, "table": 0, "vector": 0}
    for parameter in model.parameters():
        if parameter.requires_grad:
            elements[_role(parameter, hidden)] += parameter.numel()
    return elements


def _role(parameter: nn.Parameter, hidden: set[int]) -> str:
    if id(parameter) in hidden:
        return "matrix"
    return "table" if parameter.ndim >= 2 else "vector"


@dataclass(frozen=True, slots=True)
class OptimizerTraits:
    """Properties of an optimizer, found by a trial."""

    state_bytes: Mapping[str, float]
    """Bytes of state per element of a parameter, by role."""
    elementwise: bool
    """Whether every state is a number or has its parameter's shape, and so can be sharded."""
    second_moment: bool
    """Whether it keeps Adam's second moment, for `train.probe.precondition: adam`."""
    decays_weights: bool
    """Whether it applies `train.weight_decay`."""

    def bytes_of(self, elements: Mapping[str, int]) -> int:
        """Return the bytes of state for so many elements of each role."""
        return round(sum(count * self.state_bytes[role] for role, count in elements.items()))


class _Trial(nn.Module):
    """One parameter of each role."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(_WIDTH, _WIDTH)
        self.matrix = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.vector = nn.LayerNorm(_WIDTH, bias=False)


def try_optimizer(config: TrainConfig, *, on_gpu: bool = False) -> OptimizerTraits:
    """Return the traits of the recipe's optimizer after two steps on a small model.

    Args:
        config: The recipe's `train`.
        on_gpu: Whether the run is on GPUs; an optimizer that runs only there is not tried here.

    Raises:
        RecipeError: If the optimizer cannot be made, or cannot train.
    """
    from raymix.training.model.optim import build_optimizer

    if config.optimizer == "adamw" and not config.optimizer_options:
        # The default is known. A step would import torch's compiler, which takes over a second.
        moments = dict.fromkeys(("matrix", "table", "vector"), _TWO_MOMENTS)
        return OptimizerTraits(moments, True, True, True)
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    # Forked: the caller's random numbers must not depend on the trial.
    with torch.random.fork_rng(devices=[]):
        model = _Trial().to(device)
        optimizer = build_optimizer(model, config, sharded=False)
        try:
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 1e-3)
                optimizer.step()
        # Any class of anyone's: whatever it raises is the answer.
        except Exception as error:
            if on_gpu and device == "cpu":
                unknown = dict.fromkeys(("matrix", "table", "vector"), _TWO_MOMENTS)
                return OptimizerTraits(unknown, False, False, decays_weights(config))
            problem = f"a step of it fails: {type(error).__name__}: {error}"
            fix = "Take an optimizer whose step() needs no closure and takes dense gradients"
            raise _wrong(config.optimizer, problem, fix) from error
    return _traits(model, optimizer, config)


def _traits(model: _Trial, optimizer: Optimizer, config: TrainConfig) -> OptimizerTraits:
    state_bytes, elementwise, keys = dict[str, float](), True, set[str]()
    for role in ("matrix", "table", "vector"):
        parameter = getattr(model, role).weight
        state = optimizer.state.get(parameter, {})
        keys |= state.keys()
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        for key, value in state.items():
            if key not in tensors and not isinstance(value, _JSON_TYPES):
                problem = f"its state {key!r} is a {type(value).__name__}, no tensor or number"
                raise _wrong(config.optimizer, problem, "Checkpoints hold those two alone")
        # Rows, columns and counts are nothing beside a state of the parameter's size.
        full = [value for value in tensors.values() if value.numel() == parameter.numel()]
        state_bytes[role] = sum(value.nbytes for value in full) / parameter.numel()
        elementwise &= all(
            value.shape == parameter.shape or value.ndim == 0 for value in tensors.values()
        )
    groups = optimizer.param_groups
    adam = "exp_avg_sq" in keys and all({"betas", "eps"} <= group.keys() for group in groups)
    return OptimizerTraits(state_bytes, elementwise, adam, decays_weights(config))


def check_optimizer(config: TrainConfig, traits: OptimizerTraits) -> None:
    """Raise if the run needs what the optimizer does not have.

    Raises:
        RecipeError: If its state cannot be sharded and must be, or has no second moment.
    """
    if config.parallel == "fsdp2" and not traits.elementwise:
        raise RecipeError.at(
            "train.parallel",
            config.parallel,
            f"the state of {config.optimizer} has other shapes than the parameters, which FSDP2 "
            "cannot shard",
            fix="Take ddp, or another optimizer",
        )
    if config.probe.precondition == "adam" and not traits.second_moment:
        raise RecipeError.at(
            "train.probe.precondition",
            config.probe.precondition,
            f"{config.optimizer} keeps no second moment to take the metric from",
            fix="Set it to none",
        )


def _wrong(name: str, problem: str, fix: str = "") -> RecipeError:
    return RecipeError.at("train.optimizer", name, problem, fix=fix)
