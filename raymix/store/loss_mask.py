"""Loss masks: which tokens of a split are to be predicted (the answers of conversations).

Stored as spans of the split's stream, in an Arrow file beside the document lengths. A split without
the file predicts every token but the first of each document. Axes: E span edges, N ranges.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from raymix.store.columns import read_numbers, write_numbers

LOSS_MASK_FILE = "loss_mask.arrow"
"""Name of the file in the directory of a split."""

Ints = npt.NDArray[np.int64]


class LossMask:
    """Spans of a split's stream whose tokens are to be predicted."""

    def __init__(self, edge_E: Ints) -> None:
        """Keep the spans `edge_E[2 * i] <= position < edge_E[2 * i + 1]`, increasing, shape (E,).

        Raises:
            ValueError: If the edges are not increasing pairs.
        """
        if edge_E.size % 2 or (edge_E.size and edge_E[0] < 0) or np.any(np.diff(edge_E) <= 0):
            raise ValueError("the edges of the loss mask do not increase")
        self.edge_E = edge_E
        lengths = edge_E[1::2] - edge_E[::2]
        # Prefix sums, so that counting takes two searches per range, whatever its length.
        self._before = np.concatenate([[0], np.cumsum(lengths)])

    def count(self, first_N: Ints, last_N: Ints) -> Ints:
        """Return the number of tokens to predict in each range [first, last), shape (N,)."""
        return self._until(last_N) - self._until(first_N)

    def mask(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Return which of the tokens [first, last) are to be predicted, shape (last - first,)."""
        inside = np.searchsorted(self.edge_E, [first, last], side="right")
        # A position is inside a span if an odd number of edges lie at or before it.
        turns = np.zeros(last - first + 1, dtype=np.int64)
        turns[self.edge_E[inside[0] : inside[1]] - first] = 1
        return (np.cumsum(turns[:-1]) + inside[0]) % 2 == 1

    def _until(self, position_N: Ints) -> Ints:
        """Return the number of tokens to predict before each position, shape (N,)."""
        # Spans that began strictly before the position; a span that begins at it has no token
        # before it.
        begun_N = np.searchsorted(self.edge_E[::2], position_N, side="left")
        open_N = np.maximum(begun_N - 1, 0)
        if not self.edge_E.size:
            return np.zeros_like(position_N)
        # The part of the last span that lies beyond the position.
        over_N = np.maximum(self.edge_E[1::2][open_N] - position_N, 0)
        return self._before[begun_N] - np.where(begun_N > 0, over_N, 0)


def write_loss_mask(url: str, chunks: Iterable[Ints]) -> str:
    """Write edges from chunks, and return the hash of the file's bytes.

    Raises:
        CorpusError: If the disk is full.
    """
    return write_numbers(url, "edge", np.int64, chunks)


def read_loss_mask(url: str) -> LossMask:
    """Return the mask that `write_loss_mask` wrote.

    Raises:
        OSError: If the file is absent or not an Arrow file.
        ValueError: If it holds something else.
    """
    return LossMask(read_numbers(url, "edge", np.int64))
