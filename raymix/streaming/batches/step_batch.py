"""What a stream hands out: one step's tokens for one rank, and what is known of the whole batch.

Packed, a rank reads rows; of whole documents, it reads what its schedule says, micro-batch by
micro-batch. Letters: D domains, B rows of this rank, L tokens per row, S document starts in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from raymix.streaming.blocks.block_batch import Ints, Tokens

RowStarts = tuple[Ints, Ints]


class BatchInfo(Protocol):
    """What is worked out for a batch only when somebody asks."""

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the whole batch."""
        ...

    def label_tokens(self, step: int) -> int:
        """Return the labels of the whole batch."""
        ...

    def batch_hash(self, step: int) -> str:
        """Return the name of the whole batch."""
        ...


class LocalRowInfo(Protocol):
    """The same of this rank's rows."""

    def row_starts(self, step: int) -> RowStarts:
        """Return where documents begin in this rank's rows."""
        ...


# Not frozen: that would double the cost of making one, and one is made per step.
@dataclass(slots=True)
class _Step:
    step: int
    """Number of the step."""
    version: int
    """Version of the mixture log entry it follows."""
    shares: npt.NDArray[np.float64]
    """Shares asked for, shape (D,)."""
    counts_D: Ints
    """Samples (rows or documents) of each domain in the whole batch, shape (D,)."""
    facts: BatchInfo

    @property
    def tokens_D(self) -> Ints:
        """Return the tokens of each domain in the whole batch, shape (D,), padding left out."""
        return self.facts.tokens_by_domain(self.step)

    @property
    def label_tokens(self) -> int:
        """Return how many tokens of the whole batch, over all ranks, have a label."""
        return self.facts.label_tokens(self.step)

    @property
    def batch_hash(self) -> str:
        """Return the name of the whole batch: equal for equal samples in equal order."""
        return self.facts.batch_hash(self.step)


@dataclass(slots=True)
class StepBatch(_Step):
    """One step of rows. Its arrays are its own: they stay valid as long as they are held."""

    tokens: Tokens
    """Token ids of this rank's rows, shape (B, L)."""
    domain_rows: npt.NDArray[np.int32]
    """Domain of each of this rank's rows, shape (B,)."""
    rows: LocalRowInfo

    @property
    def row_starts(self) -> RowStarts:
        """Return offsets, shape (B + 1,), into positions, shape (S,): where documents begin.

        The positions of row b are positions[offsets[b] : offsets[b + 1]].
        """
        return self.rows.row_starts(self.step)


@dataclass(frozen=True, slots=True)
class LocalDocument:
    """A document of which a rank holds the whole, or its shard."""

    domain: int
    team: tuple[int, ...]
    """The ranks that share it, rising; one rank: it holds the whole."""
    tokens: Tokens
    """Token ids of the whole document, cut at the sequence length, shape (L,)."""
    loss_mask: npt.NDArray[np.bool_] | None = None
    """Which tokens are to be predicted, shape (L,); None: all but the first."""


@dataclass(slots=True)
class DocumentBatch(_Step):
    """One step of whole documents, as a schedule gives them to a rank."""

    micro_batches: tuple[tuple[LocalDocument, ...], ...]
    """What it holds in each micro-batch; every rank has as many of them, some of them empty."""
    lengths: Ints | None = None
    """Tokens of each document of the whole batch, in the order that schedules name them by."""
