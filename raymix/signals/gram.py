"""The Gram matrix of one pass, added up layer by layer while the pieces come and go.

A parameter's pieces are made, multiplied with each other and dropped. Where a parameter is used
more than once (a head cut into chunks, a tied embedding) its pieces are added up first: the
product of sums needs all of them. Letters: N vectors, S slots (pieces that are present), A x B
the shape of a weight, V x H that of an embedding table, U of its rows that were looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raymix.errors import TrainingError
from raymix.signals.layout import PieceLayout, Split

CPU_TILE_BYTES, GPU_TILE_BYTES = 128 * 1024**2, 1024**3
"""Most bytes of pieces alive at once, where a parameter is used once."""


class GramBuffer:
    """One buffer for the pieces of one layer after the other: fresh memory costs page faults."""

    def __init__(self, tile_bytes: int | None = None) -> None:
        """Start empty.

        Args:
            tile_bytes: Most bytes to hold; None for what suits the device.
        """
        self._tile_bytes = tile_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialized tensor that is valid until the next call."""
        size = like.element_size() * torch.Size(shape).numel()
        if self._buffer.numel() < size or self._buffer.device != like.device:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self._buffer[:size].view(like.dtype).view(shape)

    def step(self, shape: tuple[int, ...], like: Tensor) -> int:
        """Return how many tensors of a shape fit, at least one."""
        suits = GPU_TILE_BYTES if like.is_cuda else CPU_TILE_BYTES
        tile_bytes = self._tile_bytes or suits
        return max(1, tile_bytes // max(1, torch.Size(shape).numel() * like.element_size()))


@dataclass(slots=True)
class _Lookup:
    """The gradient that came back through a look-up."""

    row_N: Tensor
    grad_NH: Tensor
    slot_N: Tensor


@dataclass(slots=True)
class SharedParameter:
    """A parameter in one pass: how often it was used, and what its uses brought so far."""

    name: str
    shape: tuple[int, ...]
    root: Tensor | None
    """Square root of the preconditioner."""
    products: int = 0
    """Uses other than look-ups."""
    products_left: int = 0
    tokens: int = 0
    """Tokens seen by uses that take some of the tokens at a time."""
    rows: list[Tensor] = field(default_factory=list)
    """What was looked up, one tensor per look-up."""
    looked_up_U: Tensor | None = None
    lookups: list[_Lookup] = field(default_factory=list)
    total_SX: Tensor | None = None
    """Sum over uses so far, where there is more than one."""
    kept_SUH: Tensor | None = None
    """Of the products' pieces, the rows that were looked up."""

    @property
    def done(self) -> bool:
        """Return whether every use has come back."""
        return not self.products_left and len(self.lookups) == len(self.rows)


class PassGram:
    """Takes the pieces of all parameters of one pass."""

    def __init__(
        self, layout: PieceLayout, workspace: GramBuffer, root: Callable[[str], Tensor | None]
    ) -> None:
        """Start from zero.

        Args:
            layout: The pieces of the pass.
            workspace: Where pieces are made.
            root: Square root of a parameter's preconditioner, by the parameter's name.
        """
        self.layout = layout
        self._workspace = workspace
        self._root = root
        self._shared: dict[str, SharedParameter] = {}
        self._slots = len(layout.pieces)
        self._gram_SS: Tensor | None = None

    def gram(self, n_pieces: int) -> Tensor:
        """Return the Gram matrix of all pieces on the CPU, float64, shape (P, P).

        Raises:
            RuntimeError: If no parameter was used at all.
            TrainingError: If the backward pass did not reach every use of a parameter.
        """
        if not self._shared:
            raise RuntimeError("the forward pass used no parameter that was to be measured")
        for shared in self._shared.values():
            if not shared.done:
                raise TrainingError.at(
                    "signals.mode",
                    "exact",
                    f"the backward pass reached only some uses of {shared.name!r}",
                    fix="Measure in mode 'backward' or 'last_layer'",
                )
        gram_PP = torch.zeros(n_pieces + 1, n_pieces + 1, dtype=torch.float64)
        if self._gram_SS is not None:
            # Rows of no piece are numbered -1: the last row and column, which go.
            slot_S = torch.tensor(self.layout.pieces)
            gram_PP[slot_S[:, None], slot_S] = self._gram_SS.cpu()
        return gram_PP[:-1, :-1]

    def used(self, name: str, shape: tuple[int, ...]) -> SharedParameter:
        """Return what is known of a parameter; the forward pass calls it for each use."""
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
        wanted: bool,
    ) -> Tensor | None:
        """Take pieces that are sums over vectors of `left * right`; return their sum.

        Args:
            shared: A parameter of shape (A, B).
            split: Which vectors are whose.
            left_NA: One factor.
            right_NB: The other.
            wanted: Whether the sum, the gradient, is wanted; it comes with the last use.
        """
        left_NA, right_NB = split.ordered(left_NA), split.ordered(right_NB)
        if shared.products > 1:
            total_SAB = self._total(shared, left_NA)
            for run in split.runs:
                part = total_SAB[run.slot : run.slot + run.slots]
                part.baddbmm_(*_factors(left_NA, right_NB, run.vectors, run.slots))
            return self._used_again(shared, wanted=wanted)
        A, B = shared.shape
        grad_AB = left_NA.new_empty(A, B, dtype=_wide(left_NA)) if wanted else None
        step = self._workspace.step((self._slots, B), left_NA)
        for first in range(0, A, step):
            last = min(A, first + step)
            pieces_SAB = self._workspace.take((self._slots, last - first, B), left_NA)
            for run in split.runs:
                left, right = _factors(left_NA[:, first:last], right_NB, run.vectors, run.slots)
                torch.bmm(left, right, out=pieces_SAB[run.slot : run.slot + run.slots])
            if grad_AB is not None:
                torch.sum(pieces_SAB, 0, dtype=grad_AB.dtype, out=grad_AB[first:last])
            self._take(shared, pieces_SAB, first, last)
        shared.products_left -= 1
        self._finish(shared)
        return grad_AB

    def vector(
        self, shared: SharedParameter, split: Split, values_NA: Tensor, *, wanted: bool
    ) -> Tensor | None:
        """Take pieces that are sums over vectors of `values`, for a parameter of shape (A,)."""
        values_NA = values_NA.to(_wide(values_NA))
        if shared.products > 1:
            self._total(shared, values_NA).index_add_(0, split.slot_N, values_NA)
            return self._used_again(shared, wanted=wanted)
        pieces_SA = values_NA.new_zeros(self._slots, *shared.shape)
        pieces_SA.index_add_(0, split.slot_N, values_NA)
        grad_A = pieces_SA.sum(0) if wanted else None
        self._take(shared, pieces_SA, 0, shared.shape[0])
        shared.products_left -= 1
        self._finish(shared)
        return grad_A

    def lookup(self, shared: SharedParameter, split: Split, row_N: Tensor, grad_NH: Tensor) -> None:
        """Take what came back through a look-up of the rows `row_N` of a table (V, H)."""
        shared.lookups.append(_Lookup(row_N, grad_NH, split.slot_N))
        self._finish(shared)

    def _total(self, shared: SharedParameter, like: Tensor) -> Tensor:
        if shared.total_SX is None:
            shared.total_SX = like.new_zeros(self._slots, *shared.shape)
        return shared.total_SX

    def _used_again(self, shared: SharedParameter, *, wanted: bool) -> Tensor | None:
        shared.products_left -= 1
        total_SX = shared.total_SX
        if shared.products_left or total_SX is None:
            return None
        grad = total_SX.sum(0, dtype=_wide(total_SX)) if wanted else None
        self._take(shared, total_SX, 0, shared.shape[0])
        shared.total_SX = None
        self._finish(shared)
        return grad

    def _take(self, shared: SharedParameter, pieces_SX: Tensor, first: int, last: int) -> None:
        """Multiply finished pieces of the rows `first` to `last` of a parameter."""
        if shared.root is not None:
            pieces_SX.mul_(shared.root[first:last])
        self._add(pieces_SX, pieces_SX)
        if not shared.rows:
            return
        if shared.kept_SUH is None:
            rows_U = _looked_up(shared)
            shared.kept_SUH = pieces_SX.new_empty(self._slots, len(rows_U), shared.shape[1])
        rows_U = _looked_up(shared)
        edges = torch.tensor([first, last], device=rows_U.device)
        begin, end = torch.searchsorted(rows_U, edges).tolist()
        shared.kept_SUH[:, begin:end] = pieces_SX[:, rows_U[begin:end] - first]

    def _finish(self, shared: SharedParameter) -> None:
        """Once every use has come back, add what the look-ups bring."""
        if not shared.done or not shared.rows:
            return
        rows_U = _looked_up(shared)
        table_N = torch.searchsorted(rows_U, torch.cat([part.row_N for part in shared.lookups]))
        grad_NH = torch.cat([part.grad_NH for part in shared.lookups])
        grad_NH = grad_NH.to(_wide(grad_NH))
        slot_N = torch.cat([part.slot_N for part in shared.lookups])
        H = shared.shape[1]
        step = self._workspace.step((self._slots, H), grad_NH)
        for first in range(0, len(rows_U), step):
            last = min(len(rows_U), first + step)
            pieces_SUH = self._workspace.take((self._slots, last - first, H), grad_NH).zero_()
            index_N, values_NH = slot_N * (last - first) + table_N - first, grad_NH
            if step < len(rows_U):
                inside_N = (table_N >= first) & (table_N < last)
                index_N, values_NH = index_N[inside_N], grad_NH[inside_N]
            pieces_SUH.view(-1, H).index_add_(0, index_N, values_NH)
            if shared.root is not None:
                pieces_SUH.mul_(shared.root[rows_U[first:last]])
            self._add(pieces_SUH, pieces_SUH)
            if shared.kept_SUH is not None:
                # (a + e)(a + e) = aa + ae + ea + ee, of which aa is there already.
                kept_SUH = shared.kept_SUH[:, first:last].to(pieces_SUH.dtype)
                self._add(kept_SUH, pieces_SUH, both=True)
        shared.lookups.clear()
        shared.rows.clear()
        shared.kept_SUH = shared.root = None

    def _add(self, left_SX: Tensor, right_SX: Tensor, *, both: bool = False) -> None:
        """Add the products of all slots, and with `both` the other way round as well."""
        left_SX, right_XS = left_SX.flatten(1), right_SX.flatten(1).t()
        if left_SX.dtype in (torch.float32, torch.float64):
            found_SS = torch.mm(left_SX, right_XS)
        elif left_SX.is_cuda:
            found_SS = torch.mm(left_SX, right_XS, out_dtype=torch.float32)
        else:
            found_SS = torch.mm(left_SX.float(), right_XS.float())
        if self._gram_SS is None:
            self._gram_SS = torch.zeros_like(found_SS, dtype=torch.float64)
        self._gram_SS += found_SS + found_SS.t() if both else found_SS


def _factors(
    left_NA: Tensor, right_NB: Tensor, vectors: slice, slots: int
) -> tuple[Tensor, Tensor]:
    """Return the factors of a batched product: (slots, A, n) and (slots, n, B)."""
    left = left_NA[vectors].unflatten(0, (slots, -1))
    return left.transpose(1, 2), right_NB[vectors].unflatten(0, (slots, -1))


def _looked_up(shared: SharedParameter) -> Tensor:
    if shared.looked_up_U is None:
        shared.looked_up_U = torch.unique(torch.cat([rows.flatten() for rows in shared.rows]))
    return shared.looked_up_U


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
