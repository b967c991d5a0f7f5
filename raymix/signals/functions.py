"""Autograd functions whose backward passes the pieces of the weight gradient to a `PassGram`.

Forward and backward are those of torch, except that the weight gradient is computed piece by piece.
Each function takes an `anchor`, a tensor that requires a gradient and gets none: autograd runs a
backward only where some input requires a gradient, and with frozen parameters none might. Legend
as in `gram`; O and I output and input features.
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
class ParameterUse:
    """One use of a parameter, and the accumulator of its pieces."""

    gram: PassGram
    shared: SharedParameter
    split: Split

    def product(self, left_NA: Tensor, right_NB: Tensor, *, needs_grad: bool) -> Tensor | None:
        """Add pieces that are sums of outer products; return the gradient if needed."""
        return self.gram.product(self.shared, self.split, left_NA, right_NB, needs_grad=needs_grad)

    def vector(self, values_NA: Tensor, *, needs_grad: bool) -> Tensor | None:
        """Add pieces that are sums of vectors; return the gradient if needed."""
        return self.gram.vector(self.shared, self.split, values_NA, needs_grad=needs_grad)

    def lookup(self, row_N: Tensor, grad_NH: Tensor) -> None:
        """Add the gradient of a look-up."""
        self.gram.lookup(self.shared, self.split, row_N, grad_NH)


class Product(torch.autograd.Function):
    """`x @ weight.T + bias`, or `x @ weight + bias` where the weight is (in, out)."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the product.

        Arguments: x, weight, bias or None, anchor, and a tuple of the uses of weight and bias and
        whether the weight is (in, out).
        """
        ctx, x, weight, bias, _, uses = args
        ctx.uses = uses
        # Cast here and not by autocast in `linear`: backward then saves and multiplies this dtype.
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
        # Products in the dtype of the saved tensors, also when backward is called under autocast.
        with torch.autocast(grad.device.type, enabled=False):
            grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_x = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_NO @ (weight.t() if transposed else weight)).view(ctx.shape)
            if weight_use is not None:
                factors = (x_NI, grad_NO) if transposed else (grad_NO, x_NI)
                grad_weight = weight_use.product(*factors, needs_grad=ctx.needs_input_grad[1])
            if bias_use is not None:
                grad_bias = bias_use.vector(grad_NO, needs_grad=ctx.needs_input_grad[2])
        return grad_x, grad_weight, grad_bias, None, None


class Lookup(torch.autograd.Function):
    """`table[rows]`."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings.

        Arguments: rows, table, the padding row without a gradient (-1: none), anchor, and the use.
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
        # By torch's own kernel: unlike products, the dense gradient of a look-up is no by-product
        # of the pieces, which exist only for rows that were looked up.
        if ctx.needs_input_grad[1]:
            grad_table = torch.ops.aten.embedding_dense_backward(
                grad, rows, ctx.table_rows, ctx.padding, False
            )
        row_N, grad_NH = rows.flatten(), grad.reshape(-1, grad.shape[-1])
        # As embedding_dense_backward does for the dense gradient.
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

        Arguments: x, weight, anchor, the number of vectors of the split (leading entries of x), and
        the use.
        """
        ctx, x, weight, _, n_vectors, use = args
        ctx.use, ctx.n_vectors = use, n_vectors
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = grad * weight if ctx.needs_input_grad[0] else None
        # Summed over the tokens of a vector at once: pieces of a vector need no outer products.
        values_NA = _sum_inner(grad * x, ctx.n_vectors)
        return (
            grad_x,
            ctx.use.vector(values_NA, needs_grad=ctx.needs_input_grad[1]),
            None,
            None,
            None,
        )


class Shift(torch.autograd.Function):
    """`x + bias` for a bias along the last axis."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        """Return the sum; arguments as for `Scale`."""
        ctx, x, bias, _, n_vectors, use = args
        ctx.use, ctx.n_vectors = use, n_vectors
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        (grad,) = grad_outputs
        values_NA = _sum_inner(grad, ctx.n_vectors)
        return grad, ctx.use.vector(values_NA, needs_grad=ctx.needs_input_grad[1]), None, None, None


def _sum_inner(values: Tensor, leading: int) -> Tensor:
    """Return the sums over all but the first and the last axis, shape (leading, last)."""
    # bfloat16 has 8 bits: sums over tokens would lose all but the largest terms.
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.reshape(leading, -1, values.shape[-1]).sum(1, dtype=dtype)
