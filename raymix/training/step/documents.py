"""From what a schedule gives a rank to the tensors of its micro-batches.

A micro-batch is one row: whole documents, then this rank's shards of those it shares. Labels are
shifted in whole documents, before they are cut; what is padding has none. Letters: T tokens in
the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from raymix.context_parallel import (
    ContextParallelGroups,
    DocumentPart,
    LocalShards,
    attending,
    local_positions,
)
from raymix.context_parallel.local_shards import ExchangeName
from raymix.streaming.batches.step_batch import DocumentBatch, LocalDocument
from raymix.training.model.loss import IGNORED
from raymix.training.step.batches import MicroBatchTensors

Ints = npt.NDArray[np.int64]
_NO_DOMAIN = -1


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """How a rank attends to the documents of a schedule."""

    rank: int = 0
    teams: ContextParallelGroups = field(default_factory=ContextParallelGroups)
    """Process groups of the teams that share documents."""
    exchange: ExchangeName = "gather"
    """How they share them."""
    known: bool = True
    """The model runs the attention of `raymix.context_parallel`; else its own, over position ids
    that begin again with each document, and nothing can be shared."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass."""

    micro: MicroBatchTensors
    domains: npt.NDArray[np.integer]
    """Domain of each of the rows that `micro.rows` picks from, or of each of their tokens."""
    held: LocalShards | None = None
    """What the row holds, for the attention of `raymix.context_parallel`."""

    def attending(self) -> AbstractContextManager[None]:
        """Return the context of its forward and backward pass."""
        return nullcontext() if self.held is None else attending(self.held)


def document_passes(
    batch: DocumentBatch, how: ContextParallel, device: torch.device
) -> Iterator[Pass]:
    """Yield a pass per micro-batch of this rank; one that is empty has a token without label."""
    for documents in batch.micro_batches:
        yield _pass(documents, how, device)


def _pass(documents: Sequence[LocalDocument], how: ContextParallel, device: torch.device) -> Pass:
    parts = [DocumentPart(len(document.tokens), document.ranks) for document in documents]
    held = LocalShards(parts, how.rank, how.teams, exchange=how.exchange)
    pieces = [_piece(documents[at], local_positions(parts[at], how.rank)) for at in held.order]
    # A token that nobody learns from keeps a rank without documents in step with the others.
    columns = list(zip(*pieces or [_STAND_IN], strict=True))
    tokens, positions, labels, domains = (np.concatenate(column)[None] for column in columns)
    on_device = [torch.from_numpy(part).to(device) for part in (tokens, positions, labels)]
    micro = MicroBatchTensors(on_device[0], on_device[1], on_device[2], slice(0, 1))
    return Pass(micro, domains, held if how.known else None)


_STAND_IN = tuple(np.array([value]) for value in (0, 0, IGNORED, _NO_DOMAIN))


def _piece(document: LocalDocument, position_T: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Return tokens, positions, labels and domains of the positions that a rank holds, (T,) each.

    Padding repeats the last position, which a table of learned positions has.
    """
    last = len(document.tokens) - 1
    inside_T = np.minimum(position_T, last)
    tokens = document.tokens.astype(np.int64)
    labels = np.append(tokens[1:], IGNORED)
    if document.loss_mask is not None:
        labels[:-1][~document.loss_mask[1:]] = IGNORED
    label_T = np.where(position_T <= last, labels[inside_T], IGNORED)
    domain_T = np.where(position_T <= last, document.domain, _NO_DOMAIN)
    return tokens[inside_T], inside_T, label_T, domain_T
