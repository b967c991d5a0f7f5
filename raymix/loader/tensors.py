"""Tensors of a batch: the fields that causal LMs of transformers take, and what raymix adds.

Labels are not shifted, as transformers shifts them itself: the label of a position is its own
token, or -100 where no model can or should predict it. Packed documents do not see each other
because transformers tells them apart by their positions. It does so only without an attention mask
and without a cache of keys and values, so there is no mask, and `use_cache` is False.

Axes: B rows of a part, L tokens per row, T tokens of a flat part, N documents in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from raymix.streaming.batches.step_batch import DocumentBatch, LocalDocument, StepBatch
from raymix.training.model.loss import IGNORED
from raymix.training.step.batches import positions_and_labels, starts_mask

Ints = npt.NDArray[np.int64]
Layout = Literal["rows", "flat"]
"""`rows`: tensors of shape (B, L); `flat`: one row of all tokens, (1, T)."""

# Domain of padding and of rows without a document.
_NO_DOMAIN = -1


def batch_tensors(
    batch: StepBatch | DocumentBatch, parts: int, layout: Layout
) -> Iterator[dict[str, Any]]:
    """Yield exactly `parts` parts of a rank's batch, each the tensors of one forward pass.

    Fields: `input_ids`, `labels`, `position_ids` and `domain_ids`, int64 of one shape; domains by
    number, -1 for padding; and `use_cache`, False. A part without rows or documents is one token
    without a label, so that all ranks make equally many passes.
    """
    if isinstance(batch, DocumentBatch):
        for documents in _divided(batch, parts):
            yield _as_tensors(_documents(documents))
        return
    rows = len(batch.tokens)
    tokens_BL = batch.tokens.astype(np.int64)
    starts_BL = starts_mask((rows, tokens_BL.shape[1]), *batch.row_starts)
    positions_BL, next_BL = positions_and_labels(tokens_BL, starts_BL)
    labels_BL = np.full_like(tokens_BL, IGNORED)
    # Unshifted: the label of a position is the one that its predecessor has to predict.
    labels_BL[:, 1:] = next_BL[:, :-1]
    domain_BL = np.repeat(batch.domain_rows.astype(np.int64)[:, None], tokens_BL.shape[1], axis=1)
    columns = tokens_BL, labels_BL, positions_BL, domain_BL
    for index in range(parts):
        part = slice(rows * index // parts, rows * (index + 1) // parts)
        if part.start == part.stop:
            yield _as_tensors(_unlabeled_token())
            continue
        arrays = [column[part] for column in columns]
        yield _as_tensors([a.reshape(1, -1) for a in arrays] if layout == "flat" else arrays)


def variable_length(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return the boundaries of the documents in a flat part, for variable-length attention.

    `cu_seq_lens_q` and `cu_seq_lens_k`, int32 of shape (N + 1,), and `max_length_q` and
    `max_length_k`: the names of transformers' flash attention.
    """
    starts = torch.nonzero(position_ids.flatten() == 0).flatten()
    offsets = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(offsets.diff().max())
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def pinned(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part with its tensors in pinned memory."""
    return {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in part.items()
    }


def _divided(batch: DocumentBatch, parts: int) -> list[list[LocalDocument]]:
    """Return this rank's documents in `parts` parts of about equal length, in order."""
    documents = [document for micro in batch.micro_batches for document in micro]
    lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
    # By the middle of each document on the line of all tokens: parts stay contiguous.
    middle = np.cumsum(lengths) - lengths / 2
    of_document = (middle * parts / max(1, int(lengths.sum()))).astype(np.int64)
    divided: list[list[LocalDocument]] = [[] for _ in range(parts)]
    for document, part in zip(documents, of_document.tolist(), strict=True):
        divided[min(part, parts - 1)].append(document)
    return divided


def _documents(documents: Sequence[LocalDocument]) -> list[Ints]:
    """Return tokens, labels, positions and domains of whole documents in one row, (1, T) each."""
    if not documents:
        return _unlabeled_token()
    columns: list[tuple[Ints, ...]] = []
    for document in documents:
        tokens = document.tokens.astype(np.int64)
        labels = tokens.copy()
        # Nothing precedes a document's first token.
        labels[0] = IGNORED
        if document.loss_mask is not None:
            labels[~document.loss_mask] = IGNORED
        columns.append(
            (tokens, labels, np.arange(len(tokens)), np.full(len(tokens), document.domain))
        )
    return [np.concatenate(column)[None] for column in zip(*columns, strict=True)]


def _unlabeled_token() -> list[Ints]:
    return [np.array([[value]]) for value in (0, IGNORED, 0, _NO_DOMAIN)]


def _as_tensors(arrays: Sequence[Ints]) -> dict[str, Any]:
    names = ("input_ids", "labels", "position_ids", "domain_ids")
    # The arrays are new and their rows contiguous: tensors can share their memory.
    tensors: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in zip(names, arrays, strict=True)
    }
    return tensors | {"use_cache": False}
