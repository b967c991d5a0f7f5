"""Assignment of rows to pieces, and their order in which every piece is a run.

A piece is one of the halves of a group's rows. Legend: B rows, N vectors (tokens, or heads of
tokens) in all rows, P pieces, S slots: the pieces that are present, in the order of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def assign_pieces(group_B: Tensor, *, n_groups: int, halves: int = 2) -> Tensor:
    """Return the piece of each row, shape (B,): a group's rows take turns in its halves.

    Args:
        group_B: Group of each row, shape (B,); -1 for a row of none, which stays -1.
        n_groups: Number of groups.
        halves: Pieces per group.
    """
    turn_B = torch.zeros_like(group_B)
    # The turn of a row is its rank among the rows of its group: position in the sorted order minus
    # the first position of the group.
    order_B = torch.argsort(group_B, stable=True)
    sorted_B = group_B[order_B]
    first_B = torch.searchsorted(sorted_B, sorted_B)
    turn_B[order_B] = torch.arange(len(group_B), device=group_B.device) - first_B
    return torch.where(group_B < 0, group_B, turn_B % halves * n_groups + group_B)


def order_by_piece(piece_B: Tensor) -> Tensor:
    """Return the order of rows, shape (B,), in which a recording is fastest.

    The rows of a piece are consecutive, and pieces of equally many rows are neighbors: they form
    one batched product.
    """
    piece_B = piece_B.cpu()
    distinct, inverse_B, count = torch.unique(piece_B, return_inverse=True, return_counts=True)
    # One integer key, by count and then by piece, sorts both at once.
    key_B = count[inverse_B] * len(distinct) + inverse_B
    return torch.argsort(key_B, stable=True)


def split_passes(piece_B: Tensor, passes: int) -> list[Tensor]:
    """Return the rows of each pass, ordered by piece; each piece is divided evenly over passes.

    With at most as many passes as rows, every pass has a row.
    """
    piece_B = piece_B.cpu()
    order_B = torch.argsort(piece_B, stable=True)
    # Dealt out in turn over all pieces: were every piece to begin at pass 0, pieces of few rows
    # would leave the last passes empty.
    pass_B = torch.arange(len(piece_B)) % passes
    parts = [order_B[pass_B == number] for number in range(passes)]
    return [part[order_by_piece(piece_B[part])] for part in parts]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive slots with equally many vectors each."""

    first: int
    """First vector."""
    size: int
    """Vectors per slot."""
    slot: int
    """First slot."""
    slots: int

    @property
    def vectors(self) -> slice:
        """Return the range of the run's vectors."""
        return slice(self.first, self.first + self.size * self.slots)


@dataclass(frozen=True, slots=True)
class Split:
    """Assignment of N vectors to slots."""

    order_N: Tensor | None
    """The order in which slots are runs; None if the vectors have it already."""
    slot_N: Tensor
    """Slot of each vector, in the given order, shape (N,)."""
    runs: tuple[Run, ...]

    def ordered(self, vectors_NX: Tensor) -> Tensor:
        """Return the vectors in the order of the runs."""
        return vectors_NX if self.order_N is None else vectors_NX[self.order_N]


class PieceLayout:
    """The pieces of the rows of one forward pass."""

    def __init__(self, piece_B: Tensor, length: int) -> None:
        """Number the slots.

        Args:
            piece_B: Piece of each row, -1 for rows of none, shape (B,).
            length: Tokens per row.
        """
        self._device = piece_B.device
        pieces = piece_B.cpu().tolist()
        self.rows, self.length = len(pieces), length
        self.tokens = self.rows * length
        # Slots in the order of `order_by_piece`: rows in that order then need no permutation.
        by_row = [pieces[row] for row in order_by_piece(piece_B).tolist()]
        present = list(dict.fromkeys(by_row))
        self.pieces = present
        """The piece of each slot; -1 for the slot of rows that are of none."""
        slot_of = {piece: slot for slot, piece in enumerate(present)}
        self._slot_B = torch.tensor([slot_of[piece] for piece in pieces])
        self._cache: dict[tuple[int, int, int], Split] = {}
        self._index_cache: dict[tuple[int, int], Tensor] = {}

    def slot_of_row(self, row: int) -> int:
        """Return the slot of a row."""
        return int(self._slot_B[row])

    def vectors_per_row(self, shape: torch.Size) -> int:
        """Return how many entries of the leading axis each row has; 0 if that axis has no rows."""
        if not shape:
            return 0
        return {self.tokens: self.length, self.rows: 1}.get(shape[0], 0)

    def take(self, tensor: Tensor, slot: int) -> Tensor:
        """Return a copy of a slot's entries along the leading axis; all where it has no rows."""
        per_row = self.vectors_per_row(tensor.shape)
        if not per_row:
            return tensor
        key = slot, per_row
        if key not in self._index_cache:
            slot_N = self._slot_B.repeat_interleave(per_row)
            self._index_cache[key] = torch.nonzero(slot_N == slot).flatten().to(self._device)
        return tensor[self._index_cache[key]]

    def rows_split(self, per_row: int) -> Split:
        """Return the split of `per_row` vectors from each row in turn."""
        return self._split(0, self.rows * per_row, per_row)

    def tokens_split(self, first: int, count: int) -> Split:
        """Return the split of `count` tokens from token `first` on, row after row."""
        return self._split(first, count, self.length)

    def _split(self, first: int, count: int, per_row: int) -> Split:
        # Cached: all layers of a transformer ask for the same one or two splits.
        key = (first, count, per_row)
        if key not in self._cache:
            slot_N = self._slot_B.repeat_interleave(per_row)[first : first + count]
            self._cache[key] = self._runs(slot_N)
        return self._cache[key]

    def _runs(self, slot_N: Tensor) -> Split:
        """Return the split with its maximal runs."""
        ordered = bool((slot_N[1:] >= slot_N[:-1]).all())
        order_N = None if ordered else torch.argsort(slot_N, stable=True).to(self._device)
        # bincount counts absent slots as 0: a chunk of tokens need not have vectors of all slots.
        runs: list[Run] = []
        first = 0
        for slot, size in enumerate(torch.bincount(slot_N).tolist()):
            last = runs[-1] if runs else None
            if last and last.size == size and last.slot + last.slots == slot:
                runs[-1] = Run(last.first, size, last.slot, last.slots + 1)
            elif size:
                runs.append(Run(first, size, slot, 1))
            first += size
        return Split(order_N, slot_N.to(self._device), tuple(runs))
