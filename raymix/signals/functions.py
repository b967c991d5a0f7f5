"""Operations on parameters whose backward pass hands over the pieces of the weight gradient.

Forward and backward are those of torch, except that the weight gradient is made piece by piece.
Each takes an `anchor`: a tensor that requires a gradient and gets none, which keeps the backward
pass going where the parameters themselves are held fixed. Letters as in `gram`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from raymix.signals.gram import PassGram, SharedParameter
from raymix.signals.layout import Split


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a parameter: where its pieces go."""

    gram: PassGram
    shared: SharedParameter
    split: Split

    def product(self, left_NA: Tensor, right_NB: Tensor, *, wanted: bool) -> Tensor | None:
        """Hand over a sum of outer products, and return it if it is wanted."""
        return self.gram.product(self.shared, self.split, left_NA, right_NB, wanted=wanted)

    def vector(self, values_NA: Tensor, *, wanted: bool) -> Tensor | None:
        """Hand over a sum of vectors, and return it if it is wanted."""
        return self.gram.vector(self.shared, self.split, values_NA, wanted=wanted)

    def lookup(self, row_N: Tensor, grad_NH: Tensor) -> None:
        """Hand over what came back through a look-up."""
        self.gram.lookup(self.shared, self.split, row_N, grad_NH)


class Product(torch.autograd.Function):
    """`x @ weight.T + bias`, or `x @ weight + bias` where the weight is (in, out)."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the product.

        Arguments: x, weight, bias or None, anchor, and what `uses` holds: the uses of weight and
        bias, and whether the weight is (in, out).
        """
        ctx, x, weight, bias, _, uses = args
        ctx.uses = uses
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.shape = x.shape
        return functional.linear(x, weight.t() if uses[2] else weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        weight_use, bias_use, transposed = ctx.uses
        with torch.autocast(grad.device.type, enabled=False):
            grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_x = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_NO @ (weight.t() if transposed else weight)).view(ctx.shape)
            if weight_use is not None:
                factors = (x_NI, grad_NO) if transposed else (grad_NO, x_NI)
                grad_weight = weight_use.product(*factors, wanted=ctx.needs_input_grad[1])
            if bias_use is not None:
                grad_bias = bias_use.vector(grad_NO, wanted=ctx.needs_input_grad[2])
        return grad_x, grad_weight, grad_bias, None, None


class Lookup(torch.autograd.Function):
    """`table[rows]`."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the rows looked up.

        Arguments: rows, table, the row that gets no gradient (-1: none), anchor, and the use.
        """
        ctx, rows, table, padding, _, use = args
        ctx.use, ctx.padding, ctx.table_rows = use, padding, table.shape[0]
        ctx.save_for_backward(rows)
        return functional.embedding(rows, table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        (grad,) = grad_outputs
        (rows,) = ctx.saved_tensors
        grad_table = None
        if ctx.needs_input_grad[1]:
            grad_table = torch.ops.aten.embedding_dense_backward(
                grad, rows, ctx.table_rows, ctx.padding, False
            )
        row_N, grad_NH = rows.flatten(), grad.reshape(-1, grad.shape[-1])
        if ctx.padding >= 0:
            grad_NH = grad_NH.masked_fill((row_N == ctx.padding)[:, None], 0.0)
        with torch.autocast(grad.device.type, enabled=False):
            ctx.use.lookup(row_N, grad_NH)
        return None, grad_table, None, None, None


class Scale(torch.autograd.Function):
    """`x * weight` for a weight along the last axis."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the product.

        Arguments: x, weight, anchor, how many leading entries of x are vectors of the split, and
        the use.
        """
        ctx, x, weight, _, per_split, use = args
        ctx.use, ctx.per_split = use, per_split
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = grad * weight if ctx.needs_input_grad[0] else None
        values_NA = _summed(grad * x, ctx.per_split)
        return grad_x, ctx.use.vector(values_NA, wanted=ctx.needs_input_grad[1]), None, None, None


class Shift(torch.autograd.Function):
    """`x + bias` for a bias along the last axis."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the sum; arguments as for `Scale`."""
        ctx, x, bias, _, per_split, use = args
        ctx.use, ctx.per_split = use, per_split
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        (grad,) = grad_outputs
        values_NA = _summed(grad, ctx.per_split)
        return grad, ctx.use.vector(values_NA, wanted=ctx.needs_input_grad[1]), None, None, None


def _summed(values: Tensor, leading: int) -> Tensor:
    """Return the sums over all but the first and the last axis, shape (leading, last)."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.reshape(leading, -1, values.shape[-1]).sum(1, dtype=wide)
