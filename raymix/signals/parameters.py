"""Parameters while a model runs: their names, their substitutes, and those a graph reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raymix._utils.sharded import is_sharded
from raymix.errors import TrainingError

SEQUENCE_TYPES = (list, tuple)


class ParameterNames:
    """Names of the measured parameters, by the tensors that the forward pass uses.

    FSDP2 replaces a module's sharded parameters by gathered ones, which are other objects, before
    the module runs: these are looked up in the module tree when they are first used.
    """

    def __init__(self, model: nn.Module, counted: Mapping[str, nn.Parameter]) -> None:
        """Store the names of `counted`, the measured parameters of `model`."""
        self._model = model
        self._counted = {id(parameter): name for name, parameter in counted.items()}
        # Keeps the parameter alive too: the id of a freed object is reused.
        self._resolved: dict[int, tuple[nn.Parameter, str | None]] = {}

    def name(self, parameter: nn.Parameter) -> str | None:
        """Return the name, or None where the parameter is not measured."""
        if id(parameter) not in self._resolved and not self._resolve(parameter):
            return None  # FSDP2 is still building it; not in the module tree yet.
        return self._resolved[id(parameter)][1]

    def check_known(self, parameters: Sequence[nn.Parameter]) -> None:
        """Check that names of the parameters in a graph are known.

        Raises:
            TrainingError: If FSDP2 has taken one out of the module tree before any use was seen.
        """
        sharded = any(is_sharded(each) for each in self._model.parameters())
        for parameter in parameters if sharded else ():
            if id(parameter) not in self._resolved and not self._resolve(parameter):
                raise TrainingError.at(
                    "signals.model",
                    type(self._model).__name__,
                    f"a parameter of shape {tuple(parameter.shape)} is used by an operation that no"
                    " mode of torch intercepts, as those of fused kernels, and sharded by FSDP2",
                    fix="Turn the fused kernel off, or measure under DDP or on one process",
                )

    def _resolve(self, parameter: nn.Parameter) -> bool:
        """Store the name of a parameter; return whether it is a parameter of the model."""
        if id(parameter) in self._counted:
            self._resolved[id(parameter)] = parameter, self._counted[id(parameter)]
            return True
        counted = set(self._counted.values())
        # A tied parameter has several names, of which one is measured.
        names = [
            name
            for name, other in self._model.named_parameters(remove_duplicate=False)
            if other is parameter
        ]
        if names:
            name = next((name for name in names if name in counted), None)
            self._resolved[id(parameter)] = parameter, name
        return bool(names)


class LeafSubstitution(TorchFunctionMode):
    """Runs a model with detached leaves in place of its parameters, so `.grad` stays untouched."""

    def __init__(self, names: ParameterNames, *, only: frozenset[str] | None = None) -> None:
        """Substitute the measured parameters, or `only` those named; the others are detached."""
        super().__init__()
        self._names, self._only = names, only
        self.leaves: dict[str, Tensor] = {}
        """The substitutes, by name."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the result of the operation on the substitutes."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not parameters_in(args, kwargs):
            return func(*args, **kwargs)
        args = tuple(self._substitute(value) for value in args)
        return func(*args, **{key: self._substitute(value) for key, value in kwargs.items()})

    def grads(self, outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the sum of `weights * outputs`, by the parameters' names.

        Call it when the mode is off: it would substitute parameters in `torch.autograd.grad`.
        """
        inputs = list(self.leaves.items())
        # Uses that no mode sees, such as `autograd.Function.apply`, have no substitute.
        reached = reached_parameters(outputs)
        self._names.check_known(reached)
        for parameter in reached:
            name = self._names.name(parameter)
            if name is not None and (self._only is None or name in self._only):
                inputs.append((name, parameter))
        if not inputs:
            return {}
        names, tensors = zip(*inputs, strict=True)
        # A leaf that the outputs do not depend on gets zeros and not None.
        grads = torch.autograd.grad(outputs, tensors, weights, materialize_grads=True)
        total: dict[str, Tensor] = {}
        for name, grad in zip(names, grads, strict=True):
            total[name] = total[name] + grad if name in total else grad
        return total

    def _substitute(self, value: Any) -> Any:
        if isinstance(value, SEQUENCE_TYPES):
            return type(value)(self._substitute(item) for item in value)
        if not is_parameter(value):
            return value
        name = self._names.name(value)
        if name is None or (self._only is not None and name not in self._only):
            return value.detach()
        # One leaf for all uses: autograd sums their gradients.
        if name not in self.leaves:
            self.leaves[name] = value.detach().requires_grad_()
        return self.leaves[name]


def is_parameter(value: Any) -> TypeGuard[nn.Parameter]:
    """Return whether `value` is a parameter that a model computes with, not a shard of FSDP2."""
    return isinstance(value, nn.Parameter) and not is_sharded(value)


def parameters_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the parameters among the arguments of an operation."""
    parameters: list[nn.Parameter] = []
    # Every operation of the model passes here: no new tuple where there are no keywords.
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, SEQUENCE_TYPES):
            parameters += [item for item in value if is_parameter(item)]
        elif is_parameter(value):
            parameters.append(value)
    return parameters


def reached_parameters(outputs: Sequence[Tensor]) -> list[nn.Parameter]:
    """Return the parameters that the graph of `outputs` would accumulate gradients in."""
    nodes = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(nodes)
    reached: list[nn.Parameter] = []
    while nodes:
        node = nodes.pop()
        # Only the nodes that accumulate into leaves have a variable.
        leaf = getattr(node, "variable", None)
        if is_parameter(leaf):
            reached.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return reached
