"""The state of any torch optimizer in a checkpoint, by parameter name.

`optimizer.safetensors` has a tensor `NAME.KEY` for each tensor of a parameter's state, for AdamW
`NAME.exp_avg`, `NAME.exp_avg_sq` and `NAME.step`. Its metadata has as JSON what is no tensor:
numbers in the state of a parameter, numbers that the optimizer keeps in its groups, and the names
of parameters without state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from raymix.errors import TrainingError
from raymix.training.model.parallel import Replica, shard_like

OPTIMIZER_FILE = "optimizer.safetensors"
_METADATA = "raymix"
# Chosen for the device and the sharding of each start, so a checkpoint must not bring them back;
# the learning rate is a function of the step.
_NOT_SAVED = frozenset({"params", "lr", "fused", "foreach", "capturable", "differentiable"})


def _parameters(replica: Replica) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters by name."""
    for name, parameter in replica.model.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def optimizer_tensors(
    replica: Replica, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Return the tensors of the optimizer's state, `NAME.KEY`, as they are placed and sharded."""
    return {
        f"{name}.{key}": value
        for name, parameter in _parameters(replica)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_metadata(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return the rest of the optimizer's state, as metadata of a safetensors file."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in _parameters(replica)}
    document = {
        "numbers": {
            name: numbers
            for name, state in states.items()
            if (numbers := {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)})
        },
        "stateless": [name for name, state in states.items() if not state],
        "groups": [
            {key: value for key, value in group.items() if _is_saved(key, value)}
            for group in optimizer.param_groups
        ],
    }
    return {_METADATA: json.dumps(document)}


def _is_saved(key: str, value: object) -> bool:
    return key not in _NOT_SAVED and isinstance(value, int | float | str | None)


def load_optimizer(checkpoint: Path, replica: Replica, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state in `checkpoint`, placed and sharded as the parameters are.

    Raises:
        TrainingError: If the file does not fit the model.
    """
    # By parameter name. `Optimizer.load_state_dict` goes by position in the parameter groups, which
    # would tie a checkpoint to their order.
    states: dict[str, dict[str, Any]] = {}
    with safe_open(checkpoint / OPTIMIZER_FILE, framework="pt") as file:
        for full_name in file.keys():  # noqa: SIM118 - the file is no mapping
            name, _, key = full_name.rpartition(".")
            states.setdefault(name, {})[key] = file.get_tensor(full_name)
        # Absent in checkpoints of versions that knew AdamW alone.
        document = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    for name, numbers in document.get("numbers", {}).items():
        states.setdefault(name, {}).update(numbers)
    stateless = set(document.get("stateless", ()))
    for name, parameter in _parameters(replica):
        if name not in states and name not in stateless:
            raise TrainingError.at("checkpoint", str(checkpoint), f"no moments of {name}")
        if name in states:
            state = states[name]
            optimizer.state[parameter] = {
                key: _placed(key, value, parameter, optimizer) for key, value in state.items()
            }
    for group, values in zip(optimizer.param_groups, document.get("groups", ()), strict=False):
        group.update(values)


def _placed(
    key: str, value: object, parameter: nn.Parameter, optimizer: torch.optim.Optimizer
) -> object:
    """Return a value of a parameter's state on the parameter's device, sharded as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step":
        # The fused kernel reads the count on the GPU; the others would synchronize for it.
        fused = any(group.get("fused") for group in optimizer.param_groups)
        return value.to(parameter.device) if parameter.is_cuda and fused else value
    if value.shape == parameter.shape:
        return shard_like(value, parameter)
    return value.to(parameter.device)
