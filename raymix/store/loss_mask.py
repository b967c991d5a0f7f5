"""Which tokens of a split are to be predicted, where not all are: the answers of conversations.

Spans of the split's stream in one Arrow file beside the lengths of its documents. A split without
the file is learned whole, but for the first token of each document. Letters: E edges, N stretches.
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
        """Hold spans: `edge_E[2 * i] <= place < edge_E[2 * i + 1]`, rising and apart, shape (E,).

        Raises:
            ValueError: If they are not that.
        """
        if edge_E.size % 2 or (edge_E.size and edge_E[0] < 0) or np.any(np.diff(edge_E) <= 0):
            raise ValueError("spans of tokens to learn that do not rise")
        self.edge_E = edge_E
        lengths = edge_E[1::2] - edge_E[::2]
        self._before = np.concatenate([[0], np.cumsum(lengths)])

    def count(self, first_N: Ints, last_N: Ints) -> Ints:
        """Return how many of the tokens of each stretch [first, last) are learned, shape (N,)."""
        return self._until(last_N) - self._until(first_N)

    def mask(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Return which of the tokens [first, last) are learned, shape (last - first,)."""
        inside = np.searchsorted(self.edge_E, [first, last], side="right")
        turns = np.zeros(last - first + 1, dtype=np.int64)
        turns[self.edge_E[inside[0] : inside[1]] - first] = 1
        return (np.cumsum(turns[:-1]) + inside[0]) % 2 == 1

    def _until(self, place_N: Ints) -> Ints:
        """Return how many tokens before each place are learned."""
        begun_N = np.searchsorted(self.edge_E[::2], place_N, side="left")
        open_N = np.maximum(begun_N - 1, 0)
        if not self.edge_E.size:
            return np.zeros_like(place_N)
        over_N = np.maximum(self.edge_E[1::2][open_N] - place_N, 0)
        return self._before[begun_N] - np.where(begun_N > 0, over_N, 0)


def write_loss_mask(url: str, pieces: Iterable[Ints]) -> str:
    """Write edges that come in pieces, and return the hash of the file's bytes.

    Raises:
        CorpusError: If the disk is full.
    """
    return write_numbers(url, "edge", np.int64, pieces)


def read_loss_mask(url: str) -> LossMask:
    """Return what `write_loss_mask` wrote.

    Raises:
        OSError: If the file is absent or not an Arrow file.
        ValueError: If it holds something else.
    """
    return LossMask(read_numbers(url, "edge", np.int64))
