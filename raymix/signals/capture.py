"""Interception of all operations on parameters while a model runs.

Models are not patched: a `TorchFunctionMode` intercepts the calls themselves, so a use of a
parameter whose pieces cannot be computed is an error that names it, not a silent omission.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from raymix.errors import TrainingError
from raymix.signals.functions import ParameterUse
from raymix.signals.gram import PassGram, SharedParameter
from raymix.signals.handlers import HANDLERS, Unsupported, linear
from raymix.signals.layout import Split
from raymix.signals.parameters import SEQUENCE_TYPES, ParameterNames, parameters_in

# Sums with a number and casts: the gradient of the result is the gradient of the parameter.
_CASTS = frozenset(
    {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half}
    | {Tensor.bfloat16}
)
_SUMS = frozenset(
    {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
    | {torch.sub, Tensor.sub, Tensor.__sub__}
)


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
        # By id, as == of tensors compares elements; weak, as casts of weights are large.
        self._aliases: dict[int, tuple[weakref.ref[Tensor], nn.Parameter]] = {}
        self._replayed: frozenset[str] = frozenset()
        self._paused = False
        self.refuse: Callable[[Sequence[str], str], None] = self.raise_unsupported
        """Called with the parameters whose use cannot be split, and the reason."""
        self.inspect: Callable[[str, Tensor, Split], bool] | None = None
        """Called with a parameter's name, its inputs (N, ...) and their slots; false: refused."""

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
                self.refuse([name], f"it sees {tokens} of {self.gram.layout.tokens} tokens")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the result of the operation."""
        kwargs = kwargs or {}
        # Both spellings, as code may call either.
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **kwargs)
        if self._gram is None or self._paused or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        used = parameters_in(args, kwargs)
        if self._aliases:
            used += self._aliases_in(args, kwargs)
        if not used:
            return func(*args, **kwargs)
        names = [name for name in map(self._names.name, used) if name is not None]
        if self._replayed and names:
            own = [name for name in names if name not in self._replayed]
            # A handler would return the gradient of one and drop that of the other.
            if own and len(own) < len(names):
                self.refuse(own, "it is used beside a parameter whose module runs again")
            names = own if len(own) == len(names) else []
        if func in _CASTS or (names and _is_sum_with_number(func, args, kwargs)):
            # Not detached: an alias whose use is not intercepted must show in the graph.
            return self._alias(args[0], func(*args, **kwargs))
        handler = HANDLERS.get(func) if names else None
        if handler is not None and not (self._head_only and handler is not linear):
            try:
                return handler(self, *args, **kwargs)
            except Unsupported as error:
                if not error.may_replay:
                    raise unsupported_error(names, str(error)) from None
                self.refuse(names, str(error))
        elif names and not self._head_only:
            out = func(*args, **kwargs)
            # Without a gradient nothing is missed: shapes, detached copies, initializations.
            if not _has_grad(out):
                return out
            self.refuse(names, f"it is used in {getattr(func, '__name__', func)}")
        return func(*map(self.plain, args), **{k: self.plain(v) for k, v in kwargs.items()})

    def _alias(self, value: Any, out: Any) -> Any:
        """Return `out`, which from now on stands for the parameter that `value` is."""
        parameter = self.parameter(value)
        # A cast may return the parameter itself; `x.type_as(parameter)` is no use of it.
        if parameter is not None and out is not value and out.is_floating_point():
            self._aliases[id(out)] = weakref.ref(out), parameter
        return out

    def _aliases_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[nn.Parameter]:
        # Keywords too: `linear(x, weight=weight.float())`.
        standing = (
            self.parameter(value)
            for value in (*args, *kwargs.values())
            if not isinstance(value, nn.Parameter)
        )
        return [parameter for parameter in standing if parameter is not None]

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
        given = gradient if isinstance(gradient, SEQUENCE_TYPES) else [gradient] * len(losses)
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

    def raise_unsupported(self, names: Sequence[str], reason: str) -> NoReturn:
        """Raise an error that names a parameter whose pieces cannot be computed.

        Raises:
            TrainingError: Always.
        """
        raise unsupported_error(names, reason)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave all operations alone inside, also those of a backward pass under this mode."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def begin_replayed(self, names: frozenset[str]) -> frozenset[str]:
        """Leave uses of these parameters alone; return those that were not left alone before."""
        more = names - self._replayed
        self._replayed |= more
        return more

    def end_replayed(self, names: frozenset[str]) -> None:
        """Intercept uses of these parameters again."""
        self._replayed -= names

    def replay_use(self, name: str, parameter: Tensor) -> SharedParameter:
        """Return the accumulator of a parameter in a module that runs again, and count the use."""
        shared = self.gram.register_use(name, tuple(parameter.shape))
        if self.forward_runs:
            shared.products += 1
            shared.products_left += 1
            shared.replayed = True
        return shared

    # The methods below are the interface of the handlers.

    def parameter(self, value: Any) -> nn.Parameter | None:
        """Return the parameter that `value` is or stands for."""
        if isinstance(value, nn.Parameter):
            return value
        alias = self._aliases.get(id(value))
        # The id of a freed tensor is reused.
        return alias[1] if alias is not None and alias[0]() is value else None

    def plain(self, value: Any) -> Any:
        """Return an argument of an operation, detached if it is a parameter and these are fixed."""
        if self._fixed and self.parameter(value) is not None:
            return value.detach()
        return value

    def use(self, value: Any, split: Split, *, product: bool = True) -> ParameterUse | None:
        """Return the accumulator of a parameter's pieces; None where it is not measured."""
        parameter = self.parameter(value)
        name = None if parameter is None else self._names.name(parameter)
        if name is None or parameter is None or name in self._replayed:
            return None
        shared = self.gram.register_use(name, tuple(parameter.shape))
        # Recomputation by checkpointing runs the same uses again: count only the forward pass.
        if self.forward_runs and product:
            shared.products += 1
            shared.products_left += 1
        return ParameterUse(self.gram, shared, split)

    def split(self, x: Tensor, parameter: Any, *, inner: int) -> Split:
        """Return the slots of the vectors of `x`: all axes but its last `inner` ones.

        `x` has all rows, in any shape that begins with their number, or is a flat list of tokens,
        possibly in chunks and in order.

        Raises:
            Unsupported: If it is neither.
        """
        split = self._split(x, parameter, inner)
        self.check(x, parameter, split)
        return split

    def check(self, x: Tensor, parameter: Any, split: Split) -> None:
        """Let a survey see the vectors that a split assigns to slots.

        Raises:
            Unsupported: If it finds that they are not of these slots.
        """
        if self.inspect is None:
            return
        owner = self.parameter(parameter)
        name = None if owner is None else self._names.name(owner)
        if name is not None and not self.inspect(name, x.reshape(len(split.slot_N), -1), split):
            raise Unsupported("its inputs are not the rows in order")

    def _split(self, x: Tensor, parameter: Any, inner: int) -> Split:
        layout, leading = self.gram.layout, x.shape[: x.ndim - inner]
        count = leading.numel()
        if len(leading) > 1 and leading[0] == layout.rows and count % layout.tokens == 0:
            return layout.rows_split(count // layout.rows)
        if len(leading) != 1 or count > layout.tokens:
            raise Unsupported(f"its input of shape {tuple(x.shape)} is not one vector per token")
        if count == layout.tokens:
            return layout.rows_split(layout.length)
        owner = self.parameter(parameter)
        name = (self._names.name(owner) if owner is not None else None) or ""
        # The forward pass sees the chunks in order. The nodes of a recomputed chunk are not the
        # ones that autograd runs, so any split does for them.
        if not self.forward_runs:
            return layout.tokens_split(0, count)
        first_token = self._tokens_seen.get(name, 0) % layout.tokens
        # Some of the tokens in any order look alike, as those that are routed to an expert.
        if not _is_chunk(x, first_token, layout.tokens, inner):
            raise Unsupported("its inputs are not the tokens in order")
        self._tokens_seen[name] = self._tokens_seen.get(name, 0) + count
        return layout.tokens_split(first_token, count)


def unsupported_error(names: Sequence[str], reason: str) -> TrainingError:
    """Return the error of parameters whose pieces cannot be computed."""
    listed = ", ".join(map(repr, names))
    return TrainingError.at(
        "signals.mode",
        "exact",
        f"no pieces for the parameter {listed}: {reason}",
        fix="Measure in mode 'backward' or 'last_layer'",
    )


def _is_sum_with_number(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    # In this order: `number - parameter` would change the gradient's sign.
    return func in _SUMS and not kwargs and len(args) == 2 and isinstance(args[1], int | float)


def _has_grad(out: Any) -> bool:
    """Return whether an operation's result has a gradient, and is not the parameter itself."""
    if isinstance(out, SEQUENCE_TYPES):
        return any(map(_has_grad, out))
    return isinstance(out, Tensor) and out.requires_grad and not isinstance(out, nn.Parameter)


def _is_chunk(x: Tensor, first: int, tokens: int, inner: int) -> bool:
    """Return whether `x` is a slice, from vector `first` on, of a tensor of all tokens."""
    base = x._base
    size = x.shape[x.ndim - inner :].numel()
    return (
        base is not None
        and base.numel() == tokens * size
        and base.is_contiguous()
        and x.is_contiguous()
        and x.storage_offset() == base.storage_offset() + first * size
    )
