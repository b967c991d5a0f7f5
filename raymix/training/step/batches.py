"""Tensors of the micro-batches of packed rows: tokens, positions, labels.

Axes: B rows, L tokens per row, S document starts in all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from raymix.store import Corpus, Split
from raymix.training.model.loss import IGNORED


class RowBatch(Protocol):
    """The rows of one rank in a step, and where documents begin in them."""

    @property
    def tokens(self) -> npt.NDArray[np.unsignedinteger]:
        """Token ids, shape (B, L)."""
        ...

    @property
    def row_starts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Offsets, shape (B + 1,), into positions, shape (S,): where documents begin in a row."""
        ...


@dataclass(frozen=True, slots=True)
class MicroBatchTensors:
    """The tensors of one forward pass, all int64 of shape (B, L), on the model's device."""

    tokens_BL: torch.Tensor
    positions_BL: torch.Tensor
    labels_BL: torch.Tensor
    rows: slice
    """Which of the rank's rows these are; empty where the pass only keeps ranks in step."""


def count_micro_batches(max_rows: int, micro_batch_rows: int) -> int:
    """Return the micro-batches of a step, from the rank with the most rows; all ranks use it."""
    return max(1, -(-max_rows // micro_batch_rows))


def max_rows_per_rank(rows_per_step: int, world_size: int) -> int:
    """Return the rows of the rank with the most, where rows are divided evenly."""
    return -(-rows_per_step // world_size)


def positions_and_labels(
    tokens_BL: npt.NDArray[np.int64], starts_BL: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the position of every token in its document and its label, both (B, L).

    A row's first document counts from 0 even where it began in an earlier row. The label is the
    next token of the row, or `IGNORED` where that begins a document or there is none.
    """
    offset_L = np.arange(tokens_BL.shape[1])
    # The newest document start at or before each position.
    begun_BL = np.maximum.accumulate(np.where(starts_BL, offset_L, 0), axis=1)
    labels_BL = np.full_like(tokens_BL, IGNORED)
    labels_BL[:, :-1] = np.where(starts_BL[:, 1:], IGNORED, tokens_BL[:, 1:])
    return offset_L - begun_BL, labels_BL


def row_loss_mask(
    corpus: Corpus,
    split: Split,
    domain_B: npt.NDArray[np.int64],
    place_B: npt.NDArray[np.int64],
    length: int,
) -> npt.NDArray[np.bool_] | None:
    """Return which tokens of rows of a split are to be predicted, shape (B, L); None: all.

    Args:
        corpus: Where they are from.
        split: `train` or `valid`.
        domain_B: The domain of each row.
        place_B: The first token of each row, counted from the beginning of its split.
        length: Tokens per row, L.
    """
    loss_mask_of = {
        domain: corpus.loss_mask(corpus.domain_names[domain], split)
        for domain in np.unique(domain_B).tolist()
    }
    if not any(loss_mask_of.values()):
        return None
    mask_BL = np.ones((len(domain_B), length), dtype=np.bool_)
    for row, (domain, place) in enumerate(zip(domain_B.tolist(), place_B.tolist(), strict=True)):
        loss_mask = loss_mask_of[domain]
        if loss_mask is not None:
            mask_BL[row] = loss_mask.mask(place, place + length)
    return mask_BL


def starts_mask(
    shape: tuple[int, int], offsets: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Return True at each document start, shape (B, L), from the rows' offsets and positions."""
    mask_BL = np.zeros(shape, dtype=np.bool_)
    mask_BL[np.repeat(np.arange(shape[0]), np.diff(offsets)), positions] = True
    return mask_BL


def micro_batches(
    batch: RowBatch,
    count: int,
    device: torch.device,
    *,
    loss_mask_BL: npt.NDArray[np.bool_] | None = None,
) -> Iterator[MicroBatchTensors]:
    """Yield exactly `count` micro-batches of nearly equal size.

    A rank with fewer rows than `count` yields rows without labels for the rest: their loss and
    gradient are zero, but all ranks make the same number of passes. Where `loss_mask_BL`,
    shape (B, L), is given, only its tokens are predicted; else every token but a document's first.
    """
    tokens_BL = batch.tokens.astype(np.int64)
    rows, length = tokens_BL.shape
    mask_BL = starts_mask((rows, length), *batch.row_starts)
    positions_BL, labels_BL = positions_and_labels(tokens_BL, mask_BL)
    if loss_mask_BL is not None:
        # Labels are the next token, so the mask is shifted with them.
        labels_BL[:, :-1][~loss_mask_BL[:, 1:]] = IGNORED
    for index in range(count):
        part = slice(rows * index // count, rows * (index + 1) // count)
        if part.start == part.stop:
            yield _unlabeled_row(length, part, device)
        else:
            yield MicroBatchTensors(
                _tensor(tokens_BL[part], device),
                _tensor(positions_BL[part], device),
                _tensor(labels_BL[part], device),
                part,
            )


def _tensor(values: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    # Slices of a batch are views; a copy to a device wants contiguous memory.
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(device, non_blocking=True) if device.type != "cpu" else tensor


def _unlabeled_row(length: int, part: slice, device: torch.device) -> MicroBatchTensors:
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device)[None]
    return MicroBatchTensors(tokens, positions, torch.full_like(tokens, IGNORED), part)


def token_loss_weights(
    micro: MicroBatchTensors, domains: npt.NDArray[np.integer], weight_D: Sequence[float]
) -> torch.Tensor:
    """Return the weight of each token's loss, float32 of shape (B, L).

    Args:
        micro: The micro-batch; its `rows` pick from `domains`.
        domains: Domain of each of the rank's rows, or of each token; -1 where there is none.
        weight_D: Loss weight of each domain, shape (D,).
    """
    own = domains[micro.rows]
    if not len(own):  # a row that only keeps ranks in step
        return torch.ones(micro.labels_BL.shape, device=micro.labels_BL.device)
    weights = np.asarray(weight_D, dtype=np.float32)[np.maximum(own, 0)]
    by_token = weights[:, None] if weights.ndim == 1 else weights
    return torch.from_numpy(by_token).to(micro.labels_BL.device).expand(micro.labels_BL.shape)
