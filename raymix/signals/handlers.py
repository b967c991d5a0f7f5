"""Handlers of the operations whose pieces one pass gives: products, look-ups, norms and biases.

A handler computes what the operation would, by the functions of `functions`; it raises
`Unsupported` for a use that cannot be split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from raymix.signals.functions import Lookup, ParameterUse, Product, Scale, Shift
from raymix.signals.gram import PassGram
from raymix.signals.layout import Split


class Unsupported(Exception):
    """A use of a parameter whose pieces cannot be computed from one pass.

    Attributes:
        may_replay: Whether running the module again for each piece gives them.
    """

    def __init__(self, reason: str, *, may_replay: bool = True) -> None:
        """Store the reason."""
        super().__init__(reason)
        self.may_replay = may_replay


class CaptureContext(Protocol):
    """The running capture, as handlers use it."""

    anchor: Tensor
    """Input of every function, so that autograd runs its backward."""
    forward_runs: bool
    """Whether this is the forward pass and not recomputation in the backward pass."""

    @property
    def gram(self) -> PassGram:
        """Return the accumulator of the pieces."""
        ...

    def parameter(self, value: Any) -> nn.Parameter | None:
        """Return the parameter that `value` is or stands for."""
        ...

    def plain(self, value: Any) -> Any:
        """Return an argument of an operation, detached if it is a parameter and these are fixed."""
        ...

    def use(self, value: Any, split: Split, *, product: bool = True) -> ParameterUse | None:
        """Return the accumulator of a parameter's pieces; None where it is not measured."""
        ...

    def split(self, x: Tensor, parameter: Any, *, inner: int) -> Split:
        """Return the slots of the vectors of `x`: all axes but its last `inner` ones."""
        ...

    def check(self, x: Tensor, parameter: Any, split: Split) -> None:
        """Let a survey see the vectors that a split assigns to slots."""
        ...


def linear(
    capture: CaptureContext,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    io: bool = False,
) -> Tensor:
    """Handle a linear layer; `io`: the weight has shape (in, out), as in GPT-2's Conv1D."""
    split = capture.split(x, weight, inner=1)
    uses = capture.use(weight, split), capture.use(bias, split), io
    bias = bias if bias is None else capture.plain(bias)
    return Product.apply(x, capture.plain(weight), bias, capture.anchor, uses)


def _addmm(
    capture: CaptureContext,
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    if (beta, alpha) != (1, 1) or capture.parameter(weight) is None:
        raise Unsupported("it is used in a scaled product")
    return linear(capture, x, weight, bias, io=True)


_EMBEDDING_OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def _embedding(
    capture: CaptureContext, rows: Tensor, table: Tensor, *positional: Any, **named: Any
) -> Tensor:
    # `sparse` only changes the form of the gradient, which the pieces replace.
    options = {**dict(zip(_EMBEDDING_OPTIONS, positional, strict=False)), **named}
    padding_idx = options.get("padding_idx")
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        name = "max_norm" if options.get("max_norm") is not None else "scale_grad_by_freq"
        reason = f"the embedding's option {name} changes weights or gradients"
        raise Unsupported(reason, may_replay=False)
    split = capture.split(rows, table, inner=0)
    use = capture.use(table, split, product=False)
    if use is None:
        return functional.embedding(rows, capture.plain(table))
    if capture.forward_runs:
        use.shared.rows.append(rows.detach())
    # Negative indices count from the end, and -1 means none for `Lookup`.
    padding = -1 if padding_idx is None else padding_idx % table.shape[0]
    return Lookup.apply(rows, capture.plain(table), padding, capture.anchor, use)


def _vector_handler(function_class: type[Scale | Shift], plain: Callable[..., Tensor]) -> Any:
    """Return the handler of a product or sum of activations and a vector of parameters."""

    def handle(capture: CaptureContext, x: Any, vector: Any, **options: Any) -> Tensor:
        if capture.parameter(vector) is None:
            x, vector = vector, x
        if options or not isinstance(x, Tensor) or capture.parameter(x) is not None:
            raise Unsupported("it is combined with a number or another parameter")
        # Another shape is broadcast, and its gradient is a sum over other axes than the tokens.
        if x.shape[-1:] != vector.shape:
            raise Unsupported(f"it has shape {tuple(vector.shape)} beside {tuple(x.shape)}")
        split, leading = _elementwise(capture, x, vector)
        use = capture.use(vector, split)
        if use is None:
            return plain(x, capture.plain(vector))
        return function_class.apply(x, capture.plain(vector), capture.anchor, leading, use)

    return handle


_scale, _shift = _vector_handler(Scale, torch.mul), _vector_handler(Shift, torch.add)


def _elementwise(capture: CaptureContext, x: Tensor, parameter: Tensor) -> tuple[Split, int]:
    """Return the split of rows, or of tokens, and its number of vectors."""
    layout = capture.gram.layout
    # A vector's piece is a sum over tokens, so a row needs only one vector: its sum.
    if x.ndim > 2 and x.shape[0] == layout.rows:
        split = layout.rows_split(1)
        capture.check(x, parameter, split)
        return split, layout.rows
    split = capture.split(x, parameter, inner=x.ndim - 1)
    return split, x.shape[0]


def _layer_norm(
    capture: CaptureContext,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    # Normalize without parameters, then scale and shift by handlers that accumulate pieces.
    out = functional.layer_norm(x, shape, None, None, eps)
    out = out if weight is None else _scale(capture, out, weight)
    return out if bias is None else _shift(capture, out, bias)


def _rms_norm(
    capture: CaptureContext,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    out = functional.rms_norm(x, shape, None, eps)
    return out if weight is None else _scale(capture, out, weight)


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: linear,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _scale),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _shift),
}
