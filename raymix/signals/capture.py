"""Sees every operation on a parameter while a model runs, whatever the model's code looks like.

Models are not patched: a `TorchFunctionMode` meets the calls themselves, so a parameter that is
used in a way whose pieces we cannot make is noticed and named rather than left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from raymix.errors import TrainingError
from raymix.signals.functions import Lookup, Product, Scale, Shift, Use
from raymix.signals.gram import PassGram
from raymix.signals.layout import Split

_MANY = (list, tuple)


class ParameterNames:
    """Names of the parameters that count, also of the stand-ins that FSDP2 gathers."""

    def __init__(self, model: nn.Module, counted: Mapping[str, nn.Parameter]) -> None:
        """Keep the names of `counted`, parameters of `model`."""
        self._model = model
        self._first = {id(parameter): name for name, parameter in counted.items()}
        self._known: dict[int, tuple[nn.Parameter, str | None]] = {}

    def name(self, parameter: nn.Parameter) -> str | None:
        """Return the name, or None where the parameter does not count."""
        if id(parameter) not in self._known and not self._learn(parameter):
            return None  # FSDP2 is just making it
        return self._known[id(parameter)][1]

    def _learn(self, parameter: nn.Parameter) -> bool:
        """Remember a parameter of the model; return whether it is one."""
        if id(parameter) in self._first:
            self._known[id(parameter)] = parameter, self._first[id(parameter)]
            return True
        counted = set(self._first.values())
        # Under the name that counts, where it has several.
        names = [
            name
            for name, other in self._model.named_parameters(remove_duplicate=False)
            if other is parameter
        ]
        if names:
            name = next((name for name in names if name in counted), None)
            self._known[id(parameter)] = parameter, name
        return bool(names)


class StandIns(TorchFunctionMode):
    """Lets a model run with leaves in the place of its parameters: `.grad` is never touched."""

    def __init__(self, names: ParameterNames) -> None:
        """Stand in for the parameters that count; the others are held fixed."""
        super().__init__()
        self._names = names
        self.leaves: dict[str, Tensor] = {}
        """The stand-ins, by name."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return what the operation gives on the stand-ins."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not _parameters(args, kwargs):
            return func(*args, **kwargs)
        args = tuple(self._swapped(value) for value in args)
        return func(*args, **{key: self._swapped(value) for key, value in kwargs.items()})

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, _MANY):
            return type(value)(self._swapped(item) for item in value)
        if not _is_parameter(value):
            return value
        name = self._names.name(value)
        if name is None:
            return value.detach()
        if name not in self.leaves:
            self.leaves[name] = value.detach().requires_grad_()
        return self.leaves[name]


class Capture(TorchFunctionMode):
    """Replaces the operations on parameters by those that hand over pieces."""

    def __init__(self, names: ParameterNames, *, fixed: bool, head_only: bool) -> None:
        """Wait for a pass to begin.

        Args:
            names: The parameters that count.
            fixed: Make no gradients: only `anchor` requires one.
            head_only: Only matrix products count; a tied look-up does not.
        """
        super().__init__()
        self._gram: PassGram | None = None
        self._names = names
        self._fixed, self._head_only = fixed, head_only
        self.anchor = torch.zeros((), requires_grad=True)
        """What to ask a gradient for when parameters are fixed."""
        self.forward_runs = False
        """Uses are counted; later runs of the same code belong to checkpointing."""
        self._partial: dict[str, int] = {}

    @property
    def begun(self) -> bool:
        """Return whether the forward pass has begun."""
        return self._gram is not None

    @property
    def gram(self) -> PassGram:
        """Return what takes the pieces.

        Raises:
            RuntimeError: If the forward pass has not begun.
        """
        if self._gram is None:
            raise RuntimeError("no pass has begun")
        return self._gram

    def begin(self, gram: PassGram) -> None:
        """Hand over the pieces of the forward pass that begins now to `gram`."""
        self._gram, self.forward_runs = gram, True

    def close_forward(self) -> None:
        """Note that the forward pass is over.

        Raises:
            TrainingError: If a parameter saw only some of the tokens.
        """
        self.forward_runs = False
        for name, tokens in self._partial.items():
            if tokens % self.gram.layout.tokens:
                self.refuse(name, f"it sees {tokens} of {self.gram.layout.tokens} tokens")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return what the operation gives."""
        kwargs = kwargs or {}
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **kwargs)
        if self._gram is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        used = _parameters(args, kwargs)
        if not used:
            return func(*args, **kwargs)
        names = [name for name in map(self._names.name, used) if name is not None]
        handler = _HANDLERS.get(func) if names else None
        if handler is not None and not (self._head_only and handler is not _linear):
            return handler(self, *args, **kwargs)
        if not names or self._head_only:
            return func(*map(self.plain, args), **{k: self.plain(v) for k, v in kwargs.items()})
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad and not isinstance(out, nn.Parameter):
            self.refuse(names[0], f"it is used in {getattr(func, '__name__', func)}")
        return out

    def _backward(
        self,
        losses: Tensor | Sequence[Tensor],
        gradient: Tensor | Sequence[Tensor | None] | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
        **named: Any,
    ) -> None:
        """Run a backward pass with this mode on, for what checkpointing makes again there.

        `backward` of torch would call us again and again: it hands over to the mode first.
        """
        gradient = named.get("grad_tensors", gradient)
        losses = (losses,) if isinstance(losses, Tensor) else tuple(losses)
        given = gradient if isinstance(gradient, _MANY) else [gradient] * len(losses)
        grads = tuple(
            torch.ones_like(loss) if grad is None else grad
            for loss, grad in zip(losses, given, strict=True)
        )
        with self:
            _engine_run_backward(
                losses,
                grads,
                bool(retain_graph or create_graph),
                create_graph,
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def refuse(self, name: str, wrong: str) -> NoReturn:
        """Say which parameter cannot be treated, and why.

        Raises:
            TrainingError: Always.
        """
        fault = f"no pieces for the parameter {name!r}: {wrong}"
        raise TrainingError.at(
            "signals.mode", "exact", fault, fix="Measure in mode 'backward' or 'last_layer'"
        )

    # What follows serves the handlers below.

    def plain(self, value: Any) -> Any:
        """Return an argument as the operation shall see it: a parameter that is fixed, fixed."""
        if self._fixed and isinstance(value, nn.Parameter):
            return value.detach()
        return value

    def use(self, parameter: Tensor | None, split: Split, *, product: bool = True) -> Use | None:
        """Return where the pieces of a parameter go; None where it does not count."""
        name = self._names.name(parameter) if isinstance(parameter, nn.Parameter) else None
        if name is None or parameter is None:
            return None
        shared = self.gram.used(name, tuple(parameter.shape))
        if self.forward_runs and product:
            shared.products += 1
            shared.products_left += 1
        return Use(self.gram, shared, split)

    def split(self, x: Tensor, parameter: Tensor, *, inner: int) -> Split:
        """Return whose the vectors of `x` are: everything but its last `inner` axes.

        Rows may come whole, in any shape that begins with their number, or as a list of tokens,
        a part at a time and in order.
        """
        layout, lead = self.gram.layout, x.shape[: x.ndim - inner]
        count = lead.numel()
        if lead and lead[0] == layout.rows and len(lead) > 1:
            return layout.rows_split(count // layout.rows)
        name = (self._names.name(parameter) if isinstance(parameter, nn.Parameter) else "") or ""
        if len(lead) != 1 or count > layout.tokens:
            self.refuse(name, f"its input of shape {tuple(x.shape)} is not one vector per token")
        if count == layout.tokens:
            return layout.rows_split(layout.length)
        # The forward pass sees the parts in order. When one is made again for the backward pass,
        # what counts is the node of the forward pass, so any split does.
        first = self._partial.get(name, 0) % layout.tokens if self.forward_runs else 0
        if first + count > layout.tokens:
            self.refuse(name, "its inputs are not the tokens in order")
        if self.forward_runs:
            self._partial[name] = self._partial.get(name, 0) + count
        return layout.tokens_split(first, count)


def _linear(
    capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, io: bool = False
) -> Tensor:
    split = capture.split(x, weight, inner=1)
    uses = capture.use(weight, split), capture.use(bias, split), io
    bias = bias if bias is None else capture.plain(bias)
    return Product.apply(x, capture.plain(weight), bias, capture.anchor, uses)


def _addmm(
    capture: Capture, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if (beta, alpha) != (1, 1) or not isinstance(weight, nn.Parameter):
        capture.refuse("addmm", "it is used in a scaled product")
    return _linear(capture, x, weight, bias, io=True)


def _embedding(
    capture: Capture,
    rows: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    split = capture.split(rows, table, inner=0)
    use = capture.use(table, split, product=False)
    if use is None:
        return functional.embedding(rows, capture.plain(table))
    if capture.forward_runs:
        use.shared.rows.append(rows.detach())
    padding = -1 if padding_idx is None else padding_idx % table.shape[0]
    return Lookup.apply(rows, capture.plain(table), padding, capture.anchor, use)


def _by_vector(recorded: type[Scale | Shift], plain: Callable[..., Tensor]) -> Any:
    """Return the handler of a product or sum of activations and a vector of parameters."""

    def handle(capture: Capture, x: Tensor, vector: Tensor) -> Tensor:
        if not isinstance(vector, nn.Parameter):
            x, vector = vector, x
        split, leading = _elementwise(capture, x, vector)
        use = capture.use(vector, split)
        if use is None:
            return plain(x, capture.plain(vector))
        return recorded.apply(x, capture.plain(vector), capture.anchor, leading, use)

    return handle


_scale, _shift = _by_vector(Scale, torch.mul), _by_vector(Shift, torch.add)


def _elementwise(capture: Capture, x: Tensor, parameter: Tensor) -> tuple[Split, int]:
    """Return the split of whole rows, or of tokens, and how many vectors that makes."""
    layout = capture.gram.layout
    if x.ndim > 2 and x.shape[0] == layout.rows and x.shape[-1:] == parameter.shape:
        return layout.rows_split(1), layout.rows
    split = capture.split(x, parameter, inner=x.ndim - 1)
    return split, x.shape[0]


def _layer_norm(
    capture: Capture,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = functional.layer_norm(x, shape, None, None, eps)
    out = out if weight is None else _scale(capture, out, weight)
    return out if bias is None else _shift(capture, out, bias)


def _rms_norm(
    capture: Capture,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    out = functional.rms_norm(x, shape, None, eps)
    return out if weight is None else _scale(capture, out, weight)


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _scale),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _shift),
}


def _is_parameter(value: Any) -> TypeGuard[nn.Parameter]:
    """Return whether a model could compute with `value`; FSDP2's shards are its own business."""
    return isinstance(value, nn.Parameter) and not isinstance(value, DTensor)


def _parameters(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, _MANY):
            found += [item for item in value if _is_parameter(item)]
        elif _is_parameter(value):
            found.append(value)
    return found
