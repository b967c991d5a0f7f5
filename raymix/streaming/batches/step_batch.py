"""Step batches: one step's tokens for one rank, and figures of the global batch.

In packed mode a rank reads rows; in document mode it reads the documents of its schedule,
micro-batch by micro-batch. Letters: D domains, B rows of this rank, L tokens per row, S document
starts in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from raymix.streaming.blocks.block_batch import Ints, Tokens

RowStarts = tuple[Ints, Ints]


# Methods and not fields: labels and hashes cost more than the batch, and most steps need neither.
class BatchInfo(Protocol):
    """Figures of the global batch, computed on request."""

    def tokens_by_domain(self, step: int) -> Ints:
        """Return the tokens of each domain in the global batch, shape (D,)."""
        ...

    def label_tokens(self, step: int) -> int:
        """Return the number of labels in the global batch."""
        ...

    def batch_hash(self, step: int) -> str:
        """Return the hash of the global batch's samples."""
        ...


class LocalRowInfo(Protocol):
    """Figures of this rank's rows, computed on request."""

    def row_starts(self, step: int) -> RowStarts:
        """Return offsets and positions of the documents' starts in this rank's rows."""
        ...


# Not frozen: that would double the time to create one, and one is created per step.
@dataclass(slots=True)
class _Step:
    step: int
    """Number of the step."""
    version: int
    """Version of the mixture log entry it follows."""
    shares: npt.NDArray[np.float64]
    """Shares by that entry, shape (D,)."""
    counts_D: Ints
    """Samples (rows or documents) of each domain in the global batch, shape (D,)."""
    info: BatchInfo

    @property
    def tokens_D(self) -> Ints:
        """Return the tokens of each domain in the global batch, shape (D,), without padding."""
        return self.info.tokens_by_domain(self.step)

    @property
    def label_tokens(self) -> int:
        """Return the number of labels in the global batch, over all ranks."""
        return self.info.label_tokens(self.step)

    @property
    def batch_hash(self) -> str:
        """Return the hash of the global batch: equal for equal samples in equal order."""
        return self.info.batch_hash(self.step)


@dataclass(slots=True)
class StepBatch(_Step):
    """One step of rows. Its arrays are copies of its own: later steps do not overwrite them."""

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
    """A document of which a rank processes the whole, or a shard."""

    domain: int
    ranks: tuple[int, ...]
    """The ranks that share it, increasing; a single rank: it has the whole document."""
    tokens: Tokens
    """Token ids of the whole document, cut at the sequence length, shape (L,)."""
    loss_mask: npt.NDArray[np.bool_] | None = None
    """Tokens that are labels, shape (L,); None: all but the first."""


@dataclass(slots=True)
class DocumentBatch(_Step):
    """One step of whole documents, as the schedule assigns them to a rank."""

    micro_batches: tuple[tuple[LocalDocument, ...], ...]
    """This rank's documents in each micro-batch; the number of micro-batches is the same on all
    ranks, and some may be empty."""
    lengths: Ints | None = None
    """Tokens of each document of the global batch, in the order by which schedules index them."""
