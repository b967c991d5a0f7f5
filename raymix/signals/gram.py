"""The Gram matrix of piece gradients of one pass, accumulated parameter by parameter.

The pieces of a parameter are computed, multiplied with each other and dropped. Where a parameter is
used more than once (a head in chunks, a tied embedding), its pieces are first summed over uses: the
inner product of sums is not the sum of inner products.

Legend: N vectors, S slots (pieces that are present), P pieces, A x B the shape of a weight, V x H
that of an embedding table, U of its V rows that were looked up, X any axes of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raymix.errors import TrainingError
from raymix.signals.layout import PieceLayout, Split

CPU_TILE_BYTES, GPU_TILE_BYTES = 128 * 1024**2, 1024**3
"""Largest size of the pieces of a parameter that is used once; larger ones are tiled by rows."""


class GramBuffer:
    """One buffer reused for the pieces of all layers: fresh memory costs page faults."""

    def __init__(self, tile_bytes: int | None = None) -> None:
        """Start empty.

        Args:
            tile_bytes: Largest size of the buffer; None for the default of the device.
        """
        self._tile_bytes = tile_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialized tensor that is valid until the next call."""
        size = like.element_size() * torch.Size(shape).numel()
        if self._buffer.numel() < size or self._buffer.device != like.device:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self._buffer[:size].view(like.dtype).view(shape)

    def rows_per_tile(self, shape: tuple[int, ...], like: Tensor) -> int:
        """Return how many rows of a shape (all pieces of one row) fit in the buffer, at least 1."""
        default = GPU_TILE_BYTES if like.is_cuda else CPU_TILE_BYTES
        tile_bytes = self._tile_bytes or default
        return max(1, tile_bytes // max(1, torch.Size(shape).numel() * like.element_size()))


@dataclass(slots=True)
class _Lookup:
    """The output gradient of one look-up."""

    row_N: Tensor
    grad_NH: Tensor
    slot_N: Tensor


@dataclass(slots=True)
class SharedParameter:
    """A parameter in one pass: the number of its uses, and their pieces so far."""

    name: str
    shape: tuple[int, ...]
    root: Tensor | None
    """Square root of the preconditioner."""
    products: int = 0
    """Uses other than look-ups."""
    products_left: int = 0
    """Uses whose backward has not run yet."""
    tokens: int = 0
    """Tokens seen by uses that take some of the tokens at a time."""
    rows: list[Tensor] = field(default_factory=list)
    """Rows of the table, one tensor per look-up."""
    looked_up_U: Tensor | None = None
    """Distinct rows of all look-ups, rising."""
    lookups: list[_Lookup] = field(default_factory=list)
    replayed: bool = False
    """Whether a use is a module that runs again: autograd computes that use's gradient itself."""
    total_SX: Tensor | None = None
    """Pieces summed over uses so far, where there is more than one use."""
    product_rows_SUH: Tensor | None = None
    """Rows of the products' pieces that were looked up too (tied embeddings)."""

    @property
    def complete(self) -> bool:
        """Return whether the backward of every use has run."""
        return not self.products_left and len(self.lookups) == len(self.rows)


class PassGram:
    """Accumulates the Gram matrix from the pieces of all parameters of one pass."""

    def __init__(
        self, layout: PieceLayout, workspace: GramBuffer, root: Callable[[str], Tensor | None]
    ) -> None:
        """Start from zero.

        Args:
            layout: The pieces of the pass.
            workspace: Buffer that the pieces are computed in.
            root: Square root of a parameter's preconditioner, by the parameter's name.
        """
        self.layout = layout
        self._workspace = workspace
        self._root = root
        self._shared: dict[str, SharedParameter] = {}
        self._slots = len(layout.pieces)
        self._gram_SS: Tensor | None = None
        self._errors: list[tuple[str, Tensor, float]] = []

    def gram(self, n_pieces: int) -> Tensor:
        """Return the Gram matrix of all pieces on the CPU, float64, shape (P, P).

        Raises:
            RuntimeError: If no parameter was used at all.
            TrainingError: If the backward pass did not reach every use of a parameter, or a module
                that ran again gave other outputs.
        """
        if not self._shared:
            raise RuntimeError("the forward pass used none of the measured parameters")
        for shared in self._shared.values():
            if not shared.complete:
                raise TrainingError.at(
                    "signals.mode",
                    "exact",
                    f"the backward pass reached only some uses of {shared.name!r}",
                    fix="Measure in mode 'backward' or 'last_layer'",
                )
        for name, error, tolerance in self._errors:
            # False for outputs that are not numbers: these show in the statistics.
            if float(error) > tolerance:
                problem = f"the module {name!r} has other outputs when it runs again for one piece"
                raise TrainingError.at(
                    "signals.mode",
                    "exact",
                    f"{problem} (relative error {float(error):.1g}): dropout, or rows that depend"
                    " on each other",
                    fix="Set dropout to 0, or measure in mode 'backward' or 'last_layer'",
                )
        gram_PP = torch.zeros(n_pieces + 1, n_pieces + 1, dtype=torch.float64)
        if self._gram_SS is not None:
            # Rows of no piece are numbered -1: the last row and column, which are cut off.
            slot_S = torch.tensor(self.layout.pieces)
            gram_PP[slot_S[:, None], slot_S] = self._gram_SS.cpu()
        return gram_PP[:-1, :-1]

    def register_use(self, name: str, shape: tuple[int, ...]) -> SharedParameter:
        """Return the state of a parameter, created at its first use in the forward pass."""
        if name not in self._shared:
            self._shared[name] = SharedParameter(name, shape, self._root(name))
        return self._shared[name]

    def product(
        self,
        shared: SharedParameter,
        split: Split,
        left_NA: Tensor,
        right_NB: Tensor,
        *,
        needs_grad: bool,
    ) -> Tensor | None:
        """Add pieces that are sums over vectors of outer products; return the gradient if needed.

        Args:
            shared: A parameter of shape (A, B).
            split: Slot of each vector.
            left_NA: Left factor.
            right_NB: Right factor.
            needs_grad: Whether to return the gradient, the sum of all pieces; with several uses,
                the last one returns it.
        """
        left_NA, right_NB = split.ordered(left_NA), split.ordered(right_NB)
        if shared.products > 1 or shared.replayed:
            total_SAB = self._total_of(shared, left_NA)
            left_NA, right_NB = left_NA.to(total_SAB.dtype), right_NB.to(total_SAB.dtype)
            # One batched product per run of slots with equally many vectors.
            for run in split.runs:
                part = total_SAB[run.slot : run.slot + run.slots]
                part.baddbmm_(*_factors(left_NA, right_NB, run.vectors, run.slots))
            own = left_NA.t() @ right_NB if shared.replayed and needs_grad else None
            return self._finish_use(shared, needs_grad=needs_grad, own=own)
        A, B = shared.shape
        dtype = _accumulation_dtype(left_NA)
        grad_AB = left_NA.new_empty(A, B, dtype=dtype) if needs_grad else None
        step = self._workspace.rows_per_tile((self._slots, B), left_NA)
        for first in range(0, A, step):
            last = min(A, first + step)
            pieces_SAB = self._workspace.allocate((self._slots, last - first, B), left_NA)
            # Every slot has a vector, so the runs overwrite all of the uninitialized buffer.
            for run in split.runs:
                left, right = _factors(left_NA[:, first:last], right_NB, run.vectors, run.slots)
                torch.bmm(left, right, out=pieces_SAB[run.slot : run.slot + run.slots])
            if grad_AB is not None:
                torch.sum(pieces_SAB, 0, dtype=grad_AB.dtype, out=grad_AB[first:last])
            self._add_pieces(shared, pieces_SAB, first, last)
        shared.products_left -= 1
        self._add_lookups(shared)
        return grad_AB

    def vector(
        self, shared: SharedParameter, split: Split, values_NA: Tensor, *, needs_grad: bool
    ) -> Tensor | None:
        """Add pieces that are sums over vectors of `values`, for a parameter of shape (A,)."""
        values_NA = values_NA.to(_accumulation_dtype(values_NA))
        if shared.products > 1 or shared.replayed:
            total_SA = self._total_of(shared, values_NA)
            total_SA.index_add_(0, split.slot_N, values_NA.to(total_SA.dtype))
            own = values_NA.sum(0) if shared.replayed and needs_grad else None
            return self._finish_use(shared, needs_grad=needs_grad, own=own)
        pieces_SA = values_NA.new_zeros(self._slots, *shared.shape)
        pieces_SA.index_add_(0, split.slot_N, values_NA)
        grad_A = pieces_SA.sum(0) if needs_grad else None
        self._add_pieces(shared, pieces_SA, 0, shared.shape[0])
        shared.products_left -= 1
        self._add_lookups(shared)
        return grad_A

    def lookup(self, shared: SharedParameter, split: Split, row_N: Tensor, grad_NH: Tensor) -> None:
        """Add the gradient of a look-up of the rows `row_N` of a table (V, H)."""
        shared.lookups.append(_Lookup(row_N, grad_NH, split.slot_N))
        self._add_lookups(shared)

    def replay(self, shared: SharedParameter, slot: int, grad: Tensor) -> None:
        """Add the gradient of one slot's vectors in one use; then call `finish_replay`."""
        like = grad.new_empty(0, dtype=_accumulation_dtype(grad))
        self._total_of(shared, like)[slot] += grad

    def finish_replay(self, shared: SharedParameter) -> None:
        """Count a use as done whose slots were added by `replay`."""
        self._finish_use(shared, needs_grad=False)
        # Not done by `_finish_use` if no slot had a gradient.
        self._add_lookups(shared)

    def compare(self, name: str, error: Tensor, tolerance: float) -> None:
        """Store the relative error of a module that ran again; `gram` checks it."""
        # Not here: reading it would synchronize with the device in the midst of a backward pass.
        self._errors.append((name, error, tolerance))

    def _total_of(self, shared: SharedParameter, like: Tensor) -> Tensor:
        """Return the pieces of a parameter summed over uses, zero at first."""
        if shared.total_SX is None:
            shared.total_SX = like.new_zeros(self._slots, *shared.shape)
        return shared.total_SX

    def _finish_use(
        self, shared: SharedParameter, *, needs_grad: bool, own: Tensor | None = None
    ) -> Tensor | None:
        """Count a use as done; with the last one, add the pieces and return the gradient.

        `own`: gradient of this use alone, where another one's does not come from the pieces.
        """
        shared.products_left -= 1
        total_SX = shared.total_SX
        if shared.products_left or total_SX is None:
            return own
        grad = own
        if needs_grad and own is None:
            grad = total_SX.sum(0, dtype=_accumulation_dtype(total_SX))
        self._add_pieces(shared, total_SX, 0, shared.shape[0])
        shared.total_SX = None
        self._add_lookups(shared)
        return grad

    def _add_pieces(
        self, shared: SharedParameter, pieces_SX: Tensor, first: int, last: int
    ) -> None:
        """Add the products of complete pieces of the rows `first` to `last` of a parameter."""
        # <g, P g'> = <sqrt(P) g, sqrt(P) g'>: scaling one copy keeps the matrix symmetric.
        if shared.root is not None:
            pieces_SX.mul_(shared.root[first:last])
        self._add_products(pieces_SX, pieces_SX)
        if not shared.rows:
            return
        # A tied embedding: the look-ups' backward runs last and needs these rows for cross terms.
        if shared.product_rows_SUH is None:
            rows_U = _looked_up(shared)
            shared.product_rows_SUH = pieces_SX.new_empty(self._slots, len(rows_U), shared.shape[1])
        rows_U = _looked_up(shared)
        edges = torch.tensor([first, last], device=rows_U.device)
        begin, end = torch.searchsorted(rows_U, edges).tolist()
        shared.product_rows_SUH[:, begin:end] = pieces_SX[:, rows_U[begin:end] - first]

    def _add_lookups(self, shared: SharedParameter) -> None:
        """Add the products of the look-ups' pieces once the backward of every use has run."""
        if not shared.complete or not shared.rows:
            return
        rows_U = _looked_up(shared)
        table_N = torch.searchsorted(rows_U, torch.cat([part.row_N for part in shared.lookups]))
        grad_NH = torch.cat([part.grad_NH for part in shared.lookups])
        grad_NH = grad_NH.to(_accumulation_dtype(grad_NH))
        slot_N = torch.cat([part.slot_N for part in shared.lookups])
        H = shared.shape[1]
        step = self._workspace.rows_per_tile((self._slots, H), grad_NH)
        for first in range(0, len(rows_U), step):
            last = min(len(rows_U), first + step)
            pieces_SUH = self._workspace.allocate((self._slots, last - first, H), grad_NH).zero_()
            index_N, values_NH = slot_N * (last - first) + table_N - first, grad_NH
            # Only tiles need the mask, which copies the gradient.
            if step < len(rows_U):
                inside_N = (table_N >= first) & (table_N < last)
                index_N, values_NH = index_N[inside_N], grad_NH[inside_N]
            pieces_SUH.view(-1, H).index_add_(0, index_N, values_NH)
            if shared.root is not None:
                pieces_SUH.mul_(shared.root[rows_U[first:last]])
            self._add_products(pieces_SUH, pieces_SUH)
            if shared.product_rows_SUH is not None:
                # (a + e)(a + e) = aa + ae + ea + ee for products a and look-ups e; aa and ee are
                # added already.
                product_rows_SUH = shared.product_rows_SUH[:, first:last].to(pieces_SUH.dtype)
                self._add_products(product_rows_SUH, pieces_SUH, symmetrize=True)
        shared.lookups.clear()
        shared.rows.clear()
        shared.product_rows_SUH = shared.root = None

    def _add_products(self, left_SX: Tensor, right_SX: Tensor, *, symmetrize: bool = False) -> None:
        """Add the inner products of all pairs of slots, with `symmetrize` their transpose too."""
        left_SX, right_XS = left_SX.flatten(1), right_SX.flatten(1).t()
        if left_SX.dtype in (torch.float32, torch.float64):
            product_SS = torch.mm(left_SX, right_XS)
        elif left_SX.is_cuda:
            # cuBLAS accumulates bfloat16 products in float32 and can return them so.
            product_SS = torch.mm(left_SX, right_XS, out_dtype=torch.float32)
        else:
            product_SS = torch.mm(left_SX.float(), right_XS.float())
        # float64: the sum over parameters cancels for nearly orthogonal gradients.
        if self._gram_SS is None:
            self._gram_SS = torch.zeros_like(product_SS, dtype=torch.float64)
        self._gram_SS += product_SS + product_SS.t() if symmetrize else product_SS


def _factors(
    left_NA: Tensor, right_NB: Tensor, vectors: slice, slots: int
) -> tuple[Tensor, Tensor]:
    """Return the factors of a batched product: (slots, A, n) and (slots, n, B)."""
    left = left_NA[vectors].unflatten(0, (slots, -1))
    return left.transpose(1, 2), right_NB[vectors].unflatten(0, (slots, -1))


def _looked_up(shared: SharedParameter) -> Tensor:
    """Return the distinct rows of all look-ups, rising, shape (U,)."""
    if shared.looked_up_U is None:
        shared.looked_up_U = torch.unique(torch.cat([rows.flatten() for rows in shared.rows]))
    return shared.looked_up_U


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    # At least float32: sums of bfloat16 over tokens would lose the small terms.
    return torch.promote_types(tensor.dtype, torch.float32)
