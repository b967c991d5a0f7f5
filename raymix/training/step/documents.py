"""Tensors of the micro-batches that a schedule assigns to a rank (document mode).

A micro-batch is one row: whole documents, then this rank's shards of shared ones. Labels are
shifted in the whole document, before it is cut into shards: a shard does not hold the token after
its last one. Padding has no label. Axes: T tokens in the row.
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
    """Context parallelism of one rank."""

    rank: int = 0
    groups: ContextParallelGroups = field(default_factory=ContextParallelGroups)
    """Process groups that share documents."""
    exchange: ExchangeName = "gather"
    """How keys and values, or heads, are exchanged."""
    own_attention: bool = True
    """The model runs the attention of `raymix.context_parallel`; otherwise its own, over position
    ids that restart with each document, and documents cannot be shared."""


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One forward and backward pass of a step."""

    micro: MicroBatchTensors
    domains: npt.NDArray[np.integer]
    """Domain of each of the rank's rows, from which `micro.rows` selects, or of each token."""
    shards: LocalShards | None = None
    """Layout of the row for the attention of `raymix.context_parallel`."""

    def attending(self) -> AbstractContextManager[None]:
        """Return the context of the forward and backward pass."""
        return nullcontext() if self.shards is None else attending(self.shards)


def document_micro_steps(
    batch: DocumentBatch, context: ContextParallel, device: torch.device
) -> Iterator[MicroStep]:
    """Yield one pass per micro-batch of this rank; an empty one has a token without a label."""
    for documents in batch.micro_batches:
        yield _micro_step(documents, context, device)


def _micro_step(
    documents: Sequence[LocalDocument], context: ContextParallel, device: torch.device
) -> MicroStep:
    parts = [DocumentPart(len(document.tokens), document.ranks) for document in documents]
    shards = LocalShards(parts, context.rank, context.groups, exchange=context.exchange)
    pieces = [
        _local_tokens(documents[at], local_positions(parts[at], context.rank))
        for at in shards.order
    ]
    # A rank without documents still runs the pass: backward all-reduces, and a rank that skipped
    # it would leave the others waiting. One token without a label has zero loss and gradient.
    columns = list(zip(*pieces or [_UNLABELED_TOKEN], strict=True))
    tokens, positions, labels, domains = (np.concatenate(column)[None] for column in columns)
    on_device = [torch.from_numpy(part).to(device) for part in (tokens, positions, labels)]
    micro = MicroBatchTensors(on_device[0], on_device[1], on_device[2], slice(0, 1))
    return MicroStep(micro, domains, shards if context.own_attention else None)


_UNLABELED_TOKEN = tuple(np.array([value]) for value in (0, 0, IGNORED, _NO_DOMAIN))


def _local_tokens(document: LocalDocument, position_T: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Return tokens, positions, labels and domains of a rank's part of a document, (T,) each.

    Padding repeats the last position: a table of learned positions has no entry beyond it.
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
