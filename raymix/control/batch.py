"""What a stream hands out: one step's rows for one rank, and what is known of the whole batch.

Letters: D domains, B rows of this rank, L tokens per row, S document starts in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from raymix.control.slab import Ints, Tokens

RowStarts = tuple[Ints, Ints]


class Facts(Protocol):
    """What is worked out for a batch only when somebody asks."""

    def row_starts(self, step: int) -> RowStarts:
        """Return where documents begin in this rank's rows."""
        ...

    def start_domains(self, step: int) -> npt.NDArray[np.int32]:
        """Return the domain of each document that begins in this rank's rows."""
        ...

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the whole batch."""
        ...

    def label_tokens(self, step: int) -> int:
        """Return the labels of the whole batch."""
        ...

    def batch_hash(self, step: int) -> str:
        """Return the name of the whole batch."""
        ...


# Not frozen: that would double the cost of making one, and one is made per step.
@dataclass(slots=True)
class StepBatch:
    """One step. Its arrays are its own: they stay valid as long as they are held."""

    step: int
    """Number of the step."""
    version: int
    """Version of the mixture log entry it follows."""
    tokens: Tokens
    """Token ids of this rank's rows, shape (B, L)."""
    domain_rows: npt.NDArray[np.int32]
    """Domain of each of this rank's rows, shape (B,); -1 where a row holds documents of several
    domains or is padding."""
    shares: npt.NDArray[np.float64]
    """Shares asked for, shape (D,)."""
    counts_D: Ints
    """Samples (rows or documents) of each domain in the whole batch, shape (D,)."""
    _facts: Facts

    @property
    def row_starts(self) -> RowStarts:
        """Return offsets, shape (B + 1,), into positions, shape (S,): where documents begin.

        The positions of row b are positions[offsets[b] : offsets[b + 1]]; padding counts as
        documents of one token each, so it has no labels.
        """
        return self._facts.row_starts(self.step)

    @property
    def start_domains(self) -> npt.NDArray[np.int32]:
        """Return the domain of each document start of `row_starts`, shape (S,); -1 for padding."""
        return self._facts.start_domains(self.step)

    @property
    def tokens_D(self) -> Ints:
        """Return the tokens of each domain in the whole batch, shape (D,), padding left out."""
        return self._facts.tokens_by_domain(self.step)

    @property
    def label_tokens(self) -> int:
        """Return how many tokens of the whole batch, over all ranks, have a label."""
        return self._facts.label_tokens(self.step)

    @property
    def batch_hash(self) -> str:
        """Return the name of the whole batch: equal for equal samples in equal order."""
        return self._facts.batch_hash(self.step)
