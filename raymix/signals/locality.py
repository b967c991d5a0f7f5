"""Test that the inputs of parameters depend only on the rows that they are said to be of.

Legend: N vectors of X entries, B rows, L tokens per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymix.signals.layout import Split


class LocalityTest:
    """Tests that the inputs of parameters depend only on the rows that they are said to be of."""

    # Of a vector's length: rounding differs where tokens are grouped otherwise.
    _TOLERANCE = 0.02

    def __init__(self) -> None:
        """Start without a reference."""
        self._projections: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._uses: dict[str, int] = {}

    def record(self, name: str, vectors_NX: Tensor, split: Split) -> bool:
        """Store the inputs of one use in the pass with the rows as they are; return True."""
        self._projections[self._next_use(name)] = _project(vectors_NX)
        return True

    def start_comparison(self) -> None:
        """Begin the pass in which one row has other tokens."""
        self._uses.clear()

    def unchanged_elsewhere(
        self, name: str, vectors_NX: Tensor, split: Split, *, slot: int
    ) -> bool:
        """Return whether a use's inputs differ only in the vectors of `slot`."""
        before = self._projections.get(self._next_use(name))
        projection_N, length_N = _project(vectors_NX)
        if before is None or before[0].shape != projection_N.shape:
            return False
        length_N = torch.maximum(length_N, before[1])
        differs_N = (projection_N - before[0]).abs() > self._TOLERANCE * length_N
        return not bool((differs_N & (split.slot_N != slot)).any())

    def _next_use(self, name: str) -> tuple[str, int]:
        number = self._uses[name] = self._uses.get(name, 0) + 1
        return name, number


def _project(vectors_NX: Tensor) -> tuple[Tensor, Tensor]:
    """Return a projection and the length of each vector, float32 of shape (N,) both."""
    # Not the vectors themselves: those of all layers take the memory of a second pass.
    vectors_NX = vectors_NX.detach().float()
    direction_X = torch.arange(vectors_NX.shape[1], device=vectors_NX.device).float().cos()
    # Not a matrix product: float32 whatever autocast says.
    return (vectors_NX * direction_X).sum(1), torch.linalg.vector_norm(vectors_NX, dim=1)


def with_first_row_changed(tokens_BL: Tensor) -> Tensor:
    """Return the tokens with the row that differs most from the first in its place."""
    changed_BL = tokens_BL.clone()
    changed_BL[0] = tokens_BL[(tokens_BL != tokens_BL[0]).flatten(1).sum(1).argmax()]
    return changed_BL
