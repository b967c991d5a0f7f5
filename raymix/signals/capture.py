"""Interception of all operations on parameters while a model runs.

Models are not patched: a `TorchFunctionMode` intercepts the calls themselves, so a use of a
parameter whose pieces cannot be computed is an error that names it, not a silent omission.
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
from raymix.signals.functions import Lookup, ParameterUse, Product, Scale, Shift
from raymix.signals.gram import PassGram
from raymix.signals.layout import Split

_SEQUENCE_TYPES = (list, tuple)


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

    def __init__(self, names: ParameterNames) -> None:
        """Substitute the measured parameters; the others are detached."""
        super().__init__()
        self._names = names
        self.leaves: dict[str, Tensor] = {}
        """The substitutes, by name."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the result of the operation on the substitutes."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not _parameters(args, kwargs):
            return func(*args, **kwargs)
        args = tuple(self._substitute(value) for value in args)
        return func(*args, **{key: self._substitute(value) for key, value in kwargs.items()})

    def _substitute(self, value: Any) -> Any:
        if isinstance(value, _SEQUENCE_TYPES):
            return type(value)(self._substitute(item) for item in value)
        if not _is_parameter(value):
            return value
        name = self._names.name(value)
        if name is None:
            return value.detach()
        # One leaf for all uses: autograd sums their gradients.
        if name not in self.leaves:
            self.leaves[name] = value.detach().requires_grad_()
        return self.leaves[name]


class Capture(TorchFunctionMode):
    """Replaces operations on parameters by those of `functions`, which accumulate pieces."""

    def __init__(self, names: ParameterNames, *, fixed: bool, head_only: bool) -> None:
        """Create the mode; it captures from `begin` on.

        Args:
            names: The measured parameters.
            fixed: Compute no parameter gradients: only `anchor` requires one.
            head_only: Measure only matrix products, not the look-up of a tied embedding.
        """
        super().__init__()
        self._gram: PassGram | None = None
        self._names = names
        self._fixed, self._head_only = fixed, head_only
        self.anchor = torch.zeros((), requires_grad=True)
        """Input of the backward pass when parameters are fixed."""
        self.forward_runs = False
        """Whether uses are counted; later runs of the same code are recomputation."""
        self._tokens_seen: dict[str, int] = {}

    @property
    def begun(self) -> bool:
        """Return whether the forward pass has begun."""
        return self._gram is not None

    @property
    def gram(self) -> PassGram:
        """Return the accumulator of the pieces.

        Raises:
            RuntimeError: If the forward pass has not begun.
        """
        if self._gram is None:
            raise RuntimeError("no pass has begun")
        return self._gram

    def begin(self, gram: PassGram) -> None:
        """Accumulate the pieces of the forward pass that begins now in `gram`."""
        self._gram, self.forward_runs = gram, True

    def close_forward(self) -> None:
        """Mark the end of the forward pass.

        Raises:
            TrainingError: If a parameter was used on only some of the tokens.
        """
        self.forward_runs = False
        # A multiple of the tokens: chunks may cover all of them several times.
        for name, tokens in self._tokens_seen.items():
            if tokens % self.gram.layout.tokens:
                self.raise_unsupported(
                    name, f"it sees {tokens} of {self.gram.layout.tokens} tokens"
                )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the result of the operation."""
        kwargs = kwargs or {}
        # Both spellings, as code may call either.
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
        # Without a gradient nothing is missed: shapes, dtypes, detached copies, initializations.
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad and not isinstance(out, nn.Parameter):
            self.raise_unsupported(names[0], f"it is used in {getattr(func, '__name__', func)}")
        return out

    def _backward(
        self,
        losses: Tensor | Sequence[Tensor],
        gradient: Tensor | Sequence[Tensor | None] | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
        **keywords: Any,
    ) -> None:
        """Run a backward pass with this mode on, as checkpointing recomputes the forward in it.

        Calls the engine directly: torch's own `backward` dispatches to the active mode first, that
        is to this method, without end.
        """
        gradient = keywords.get("grad_tensors", gradient)
        losses = (losses,) if isinstance(losses, Tensor) else tuple(losses)
        given = gradient if isinstance(gradient, _SEQUENCE_TYPES) else [gradient] * len(losses)
        grads = tuple(
            torch.ones_like(loss) if grad is None else grad
            for loss, grad in zip(losses, given, strict=True)
        )
        # torch disables the active mode while it runs this method.
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

    def raise_unsupported(self, name: str, reason: str) -> NoReturn:
        """Raise an error that names a parameter whose pieces cannot be computed.

        Raises:
            TrainingError: Always.
        """
        problem = f"no pieces for the parameter {name!r}: {reason}"
        raise TrainingError.at(
            "signals.mode", "exact", problem, fix="Measure in mode 'backward' or 'last_layer'"
        )

    # The methods below are the interface of the handlers.

    def plain(self, value: Any) -> Any:
        """Return an argument of an operation, detached if it is a parameter and these are fixed."""
        if self._fixed and isinstance(value, nn.Parameter):
            return value.detach()
        return value

    def use(
        self, parameter: Tensor | None, split: Split, *, product: bool = True
    ) -> ParameterUse | None:
        """Return the accumulator of a parameter's pieces; None where it is not measured."""
        name = self._names.name(parameter) if isinstance(parameter, nn.Parameter) else None
        if name is None or parameter is None:
            return None
        shared = self.gram.register_use(name, tuple(parameter.shape))
        # Recomputation by checkpointing runs the same uses again: count only the forward pass.
        if self.forward_runs and product:
            shared.products += 1
            shared.products_left += 1
        return ParameterUse(self.gram, shared, split)

    def split(self, x: Tensor, parameter: Tensor, *, inner: int) -> Split:
        """Return the slots of the vectors of `x`: all axes but its last `inner` ones.

        `x` has all rows, in any shape that begins with their number, or is a flat list of tokens,
        possibly in chunks and in order.
        """
        layout, leading = self.gram.layout, x.shape[: x.ndim - inner]
        count = leading.numel()
        if leading and leading[0] == layout.rows and len(leading) > 1:
            return layout.rows_split(count // layout.rows)
        name = (self._names.name(parameter) if isinstance(parameter, nn.Parameter) else "") or ""
        if len(leading) != 1 or count > layout.tokens:
            self.raise_unsupported(
                name, f"its input of shape {tuple(x.shape)} is not one vector per token"
            )
        if count == layout.tokens:
            return layout.rows_split(layout.length)
        # The forward pass sees the chunks in order. The nodes of a recomputed chunk are not the
        # ones that autograd runs, so any split does for them.
        first_token = self._tokens_seen.get(name, 0) % layout.tokens if self.forward_runs else 0
        if first_token + count > layout.tokens:
            self.raise_unsupported(name, "its inputs are not the tokens in order")
        if self.forward_runs:
            self._tokens_seen[name] = self._tokens_seen.get(name, 0) + count
        return layout.tokens_split(first_token, count)


def _linear(
    capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, io: bool = False
) -> Tensor:
    """Handle a linear layer; `io`: the weight has shape (in, out), as in GPT-2's Conv1D."""
    split = capture.split(x, weight, inner=1)
    uses = capture.use(weight, split), capture.use(bias, split), io
    bias = bias if bias is None else capture.plain(bias)
    return Product.apply(x, capture.plain(weight), bias, capture.anchor, uses)


def _addmm(
    capture: Capture, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if (beta, alpha) != (1, 1) or not isinstance(weight, nn.Parameter):
        capture.raise_unsupported("addmm", "it is used in a scaled product")
    return _linear(capture, x, weight, bias, io=True)


def _embedding(
    capture: Capture,
    rows: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    *options: Any,
    **keywords: Any,
) -> Tensor:
    given = dict(zip(("max_norm", "norm_type", "scale_grad_by_freq"), options, strict=False))
    given |= keywords
    # The others change nothing: a norm type without a norm, or the form of the gradient (sparse).
    for name in ("max_norm", "scale_grad_by_freq"):
        if given.get(name):
            problem = f"its option {name} changes weights or gradients"
            capture.raise_unsupported("embedding", problem)
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

    def handle(capture: Capture, x: Tensor, vector: Tensor) -> Tensor:
        if not isinstance(vector, nn.Parameter):
            x, vector = vector, x
        split, leading = _elementwise(capture, x, vector)
        use = capture.use(vector, split)
        if use is None:
            return plain(x, capture.plain(vector))
        return function_class.apply(x, capture.plain(vector), capture.anchor, leading, use)

    return handle


_scale, _shift = _vector_handler(Scale, torch.mul), _vector_handler(Shift, torch.add)


def _elementwise(capture: Capture, x: Tensor, parameter: Tensor) -> tuple[Split, int]:
    """Return the split of rows, or of tokens, and its number of vectors."""
    layout = capture.gram.layout
    # A vector's piece is a sum over tokens, so a row needs only one vector: its sum.
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
    # Normalize without parameters, then scale and shift by handlers that accumulate pieces.
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
    """Return whether `value` is a parameter that a model computes with, not a shard of FSDP2."""
    return isinstance(value, nn.Parameter) and not isinstance(value, DTensor)


def _parameters(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the parameters among the arguments of an operation."""
    parameters: list[nn.Parameter] = []
    # Every operation of the model passes here: no new tuple where there are no keywords.
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, _SEQUENCE_TYPES):
            parameters += [item for item in value if _is_parameter(item)]
        elif _is_parameter(value):
            parameters.append(value)
    return parameters
