"""Modules that run again: pieces of parameters whose use one pass cannot split.

Packed experts, convolutions and attention sinks do not use a parameter in one product per token.
The innermost module that sees whole rows runs again in the backward pass, once for the rows of each
piece, and its own backward gives the gradient of those parameters alone. All others stay as they
are. The outputs are compared with the first ones, as dropout or rows that depend on each other
would give wrong pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raymix.signals.capture import Capture
from raymix.signals.gram import SharedParameter
from raymix.signals.layout import PieceLayout
from raymix.signals.parameters import SEQUENCE_TYPES, LeafSubstitution, ParameterNames

# Other shapes take other kernels: rounding may differ by this much, relative to the output.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """Stands for a tensor in the arguments or results of a module."""

    index: int


def take_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Return `value` with indices in place of its tensors, which are appended to `tensors`."""

    def take(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter):
            return tensor
        tensors.append(tensor)
        return TensorIndex(len(tensors) - 1)

    return _map(value, Tensor, take)


def put_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Return the inverse of `take_tensors`."""
    return _map(value, TensorIndex, lambda position: tensors[position.index])


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, SEQUENCE_TYPES):
        items = [_map(item, kind, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        # A copy and not a new one: the model outputs of transformers are dicts with fields.
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = _map(item, kind, change)
        return changed
    return value


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module whose parameters are measured by running it again."""

    capture: Capture
    names: ParameterNames
    module: nn.Module
    label: str
    uses: Mapping[str, SharedParameter]
    arguments: Any
    """Positional and keyword arguments, with indices in place of tensors."""
    picked: tuple[int, ...]
    """Indices of the outputs that have a gradient, among the tensors of the result."""
    autocast: tuple[str, torch.dtype, bool]

    def replay(self, outs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> None:
        """Add the pieces, given the outputs, the inputs and the gradients of the outputs."""
        gram = self.capture.gram
        kind, dtype, enabled = self.autocast
        error = torch.zeros((), device=outs[0].device)
        sums = [torch.zeros_like(out) for out in outs]
        with self.capture.paused(), torch.enable_grad():
            for slot in range(len(gram.layout.pieces)):
                substitution = LeafSubstitution(self.names, only=frozenset(self.uses))
                with torch.autocast(kind, dtype, enabled, cache_enabled=False), substitution:
                    again = self._again([gram.layout.take(each, slot) for each in inputs])
                for out, own, total in zip(outs, again, sums, strict=True):
                    # Scalars are sums over rows: only their sum over slots is known.
                    total += own.detach() if not out.ndim else 0
                    if out.ndim:
                        error = torch.maximum(error, _error(own, gram.layout.take(out, slot)))
                differentiable = [index for index, own in enumerate(again) if own.requires_grad]
                weights = [gram.layout.take(grads[index], slot) for index in differentiable]
                grad_by_name = substitution.grads(
                    [again[index] for index in differentiable], weights
                )
                for name, grad in grad_by_name.items():
                    gram.replay(self.uses[name], slot, grad)
        for out, total in zip(outs, sums, strict=True):
            if not out.ndim:
                error = torch.maximum(error, _error(total, out))
        tolerance = _TOLERANCE.get(outs[0].dtype, _LOW_PRECISION_TOLERANCE)
        gram.compare(self.label, error, _LOW_PRECISION_TOLERANCE if enabled else tolerance)
        for shared in self.uses.values():
            gram.finish_replay(shared)

    def _again(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs for some of the rows."""
        args, kwargs = put_tensors(self.arguments, inputs)
        # Not `__call__`: its hooks, such as those of this package, belong to the model's own pass.
        results: list[Tensor] = []
        take_tensors(self.module.forward(*args, **kwargs), results)
        return [results[index] for index in self.picked]


def _error(again: Tensor, out: Tensor) -> Tensor:
    """Return the relative difference of two outputs, float32 of shape ()."""
    again, out = again.detach(), out.detach()
    scale = torch.linalg.vector_norm(out.float())
    difference = torch.linalg.vector_norm((again - out).float())
    return difference / scale.clamp_min(torch.finfo(torch.float32).tiny)


class RunAgain(torch.autograd.Function):
    """The outputs of a module, unchanged; its backward runs the module again."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the outputs.

        Arguments: the call, an anchor, the number of outputs, the outputs and the inputs.
        """
        ctx, call, _, count, *tensors = args
        ctx.call, ctx.count = call, count
        # Saved by autograd, so that checkpointing recomputes them.
        ctx.save_for_backward(*tensors)
        # Copies: outputs that are views may not be changed in place afterwards.
        return tuple(out.clone() for out in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of the outputs."""
        tensors = list(ctx.saved_tensors)
        outs, inputs = tensors[: ctx.count], tensors[ctx.count :]
        ctx.call.replay(outs, inputs, list(grad_outputs))
        return None, None, None, *grad_outputs, *(None for _ in inputs)


class ReplayHooks:
    """Forward hooks of one module whose parameters are measured by running it again."""

    def __init__(
        self, capture: Capture, names: ParameterNames, label: str, replayed: Mapping[str, Any]
    ) -> None:
        """Measure the parameters `replayed`, by name, of the module named `label`."""
        self._capture, self._names = capture, names
        self._label, self._parameters = label, replayed
        self._active: list[frozenset[str]] = []

    def register(self, module: nn.Module, *, running: bool) -> list[Any]:
        """Return the handles of the hooks on `module`, which may be running already."""
        # Always called, as recomputation by checkpointing stops in the midst of a module. First,
        # as the hook of a whole model ends the forward pass.
        after = module.register_forward_hook(
            self._after, with_kwargs=True, always_call=True, prepend=True
        )
        if running:
            self._before(module, (), {})
            return [after]
        return [after, module.register_forward_pre_hook(self._before, with_kwargs=True)]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._active.append(self._capture.begin_replayed(frozenset(self._parameters)))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        replayed = self._active.pop()
        self._capture.end_replayed(replayed)
        # Without names: a module around this one runs again for them.
        if result is None or not replayed or not torch.is_grad_enabled():
            return result
        inputs: list[Tensor] = []
        arguments = take_tensors((args, kwargs), inputs)
        outs: list[Tensor] = []
        outputs = take_tensors(result, outs)
        picked = picked_outputs(outs)
        kind = outs[picked[0]].device.type
        autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # Sorted: under FSDP2 a preconditioner is gathered for each, in the same order on all ranks.
        uses = {
            name: self._capture.replay_use(name, self._parameters[name])
            for name in sorted(replayed)
        }
        call = ModuleCall(
            self._capture, self._names, module, self._label, uses, arguments, picked, autocast
        )
        tensors = *(outs[index] for index in picked), *(each.detach() for each in inputs)
        watched = RunAgain.apply(call, self._capture.anchor, len(picked), *tensors)
        for index, out in zip(picked, watched, strict=True):
            outs[index] = out
        return put_tensors(outputs, outs)


def picked_outputs(outs: list[Tensor]) -> tuple[int, ...]:
    """Return the indices of the outputs that have a gradient."""
    floats = tuple(index for index, out in enumerate(outs) if out.is_floating_point())
    # With fixed parameters the first module of a model has outputs without one.
    return tuple(index for index in floats if outs[index].requires_grad) or floats


def can_replay(layout: PieceLayout, arguments: Any, result: Any) -> bool:
    """Return whether the inputs and outputs of a module call can be cut into rows.

    The leading axis alone would take any batch of as many entries for rows, so an input must have
    the rows' length, too.
    """
    inputs: list[Tensor] = []
    take_tensors(arguments, inputs)
    outs: list[Tensor] = []
    if _has_opaque(take_tensors(result, outs)):
        return False
    picked = [outs[index].shape for index in picked_outputs(outs)]
    return (
        bool(picked)
        and any(_has_rows(layout, each.shape) for each in inputs)
        and all(not shape or layout.vectors_per_row(shape) for shape in picked)
    )


def _has_rows(layout: PieceLayout, shape: torch.Size) -> bool:
    if not shape:
        return False
    channels_first = len(shape) == 3 and shape[2] == layout.length
    by_row = shape[0] == layout.rows and (shape[1:2] == (layout.length,) or channels_first)
    return by_row or shape[0] == layout.tokens


def _has_opaque(value: Any) -> bool:
    """Return whether a result has parts in which tensors may be hidden."""
    if isinstance(value, SEQUENCE_TYPES):
        return any(map(_has_opaque, value))
    if isinstance(value, dict):
        return any(map(_has_opaque, value.values()))
    return not isinstance(value, TensorIndex | int | float | str | None)
