"""Inputs of a model for rows of several documents, so that none sees another.

Most architectures keep documents apart by `position_ids` that restart at each of them: of these
`transformers` makes a block-diagonal mask. Others take that mask only if it is given. Those that
carry a state along the row (convolutions, state spaces, linear attention) or have positions of
their own (ALiBi) can do neither: their documents become rows of their own.

Legend: B rows, L tokens per row, N = B * L, R documents, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from raymix.training.model.facts import Isolation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_inputs(
    model: PreTrainedModel, isolation: Isolation, positions_BL: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments of a forward pass that say where documents begin in each row."""
    if isolation == "rows":
        return {}
    if isolation == "positions":
        return {"position_ids": positions_BL}
    from transformers.masking_utils import create_masks_for_generate

    # Only its shape, device and dtype are read.
    embedded = torch.empty(
        (*positions_BL.shape, 1), device=positions_BL.device, dtype=torch.float32
    )
    masks = create_masks_for_generate(
        config=model.config,
        inputs_embeds=embedded,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_BL,
    )
    return {"position_ids": positions_BL, "attention_mask": masks}


def document_rows(positions_BL: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield documents as rows, in groups of similar length, so that under half is padding.

    Args:
        positions_BL: Position of each token in its document, starting at 0 in every row.

    Yields:
        Places in the flat batch of N tokens, shape (R, T), and whether each is a token or padding
        to the right, which repeats the last one.
    """
    # A row begins a document wherever it was cut.
    starts_BL = positions_BL == 0
    starts_BL[:, 0] = True
    start_D = starts_BL.flatten().nonzero()[:, 0]
    end = start_D.new_tensor([positions_BL.numel()])
    length_D = torch.diff(start_D, append=end)
    length_D, order_D = length_D.sort(descending=True, stable=True)
    start_D, lengths = start_D[order_D], length_D.tolist()
    first = 0
    while first < len(lengths):
        longest, last = lengths[first], first + 1
        while last < len(lengths) and 2 * lengths[last] > longest:
            last += 1
        offset_T = torch.arange(longest, device=positions_BL.device)
        length_R1 = length_D[first:last, None]
        yield start_D[first:last, None] + offset_T.minimum(length_R1 - 1), offset_T < length_R1
        first = last
