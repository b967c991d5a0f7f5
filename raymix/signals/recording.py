"""The recording of one forward and backward pass."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from raymix.signals.gram import PassGram
from raymix.signals.statistics import PieceGram


class Recording:
    """One forward and backward pass whose pieces are being recorded."""

    def __init__(self, piece_B: Tensor, scale: float) -> None:
        """Start with nothing recorded."""
        self._piece_B, self._scale = piece_B, scale
        self._n_groups = self._n_pieces = 0
        self._gram: PassGram | None = None
        self._rows: tuple[Tensor, Tensor] | None = None
        self._pieces: PieceGram | None = None

    @property
    def pieces(self) -> PieceGram:
        """Return the recorded sums; synchronizes with the device.

        Raises:
            RuntimeError: If no forward pass took place.
        """
        if self._pieces is None:
            if self._gram is None or self._rows is None:
                raise RuntimeError("no forward pass of the probe's model was recorded")
            # Products of two gradients, so the loss scale enters squared.
            gram_PP = self._gram.gram(self._n_pieces) / self._scale**2
            self._pieces = piece_gram(self._n_groups, gram_PP, self._piece_B, self._rows)
            # Frees the device memory of the Gram matrix and its look-ups.
            self._gram = None
        return self._pieces

    def begin(self, gram: PassGram, n_groups: int, n_pieces: int) -> None:
        """Store the accumulator of the pass."""
        self._gram, self._n_groups, self._n_pieces = gram, n_groups, n_pieces

    def add_losses(self, labels_BL: Tensor, loss_BL: Tensor) -> None:
        """Store the losses of the rows."""
        self._rows = row_sums(labels_BL, loss_BL)


def row_sums(labels_BL: Tensor, loss_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label tokens and the summed loss of each row, both float64 of shape (B,)."""
    return (labels_BL >= 0).sum(1).double(), loss_BL.double().sum(1)


def piece_gram(
    n_groups: int, gram_PP: Tensor, piece_B: Tensor, sums: tuple[Tensor, Tensor]
) -> PieceGram:
    """Return the sums per piece, from label tokens and losses per row."""
    index_B = piece_B.cpu().numpy()
    has_piece_B = index_B >= 0
    columns = [np.ones(len(index_B)), *(tensor.cpu().numpy() for tensor in sums)]
    rows_P, labels_P, nats_P = (
        np.bincount(index_B[has_piece_B], value_B[has_piece_B], len(gram_PP)).astype(np.float64)
        for value_B in columns
    )
    return PieceGram(
        n_groups=n_groups,
        gram_PP=gram_PP.numpy(),
        nats_P=nats_P,
        labels_P=labels_P,
        rows_P=rows_P,
    )
