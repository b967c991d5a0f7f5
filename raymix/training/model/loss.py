"""The loss of packed rows: a sum over label tokens, never all logits of a big vocabulary at once.

Letters: B rows, L tokens per row, N = B * L, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
"""The label of a position that has none."""

MAX_LOGIT_BYTES = 256 * 1024**2
"""Most bytes of float32 logits alive at once; beyond that the head is applied in pieces."""


class PackedLoss(nn.Module):
    """Wraps a causal LM; `forward` gives the summed loss, so that DDP and FSDP see one call."""

    def __init__(
        self, model: PreTrainedModel, *, linear_head: bool, logit_bytes: int = MAX_LOGIT_BYTES
    ) -> None:
        """Wrap `model`.

        Args:
            model: The causal LM.
            linear_head: Its logits are the output embedding of the last hidden state; without
                that the logits cannot be made in pieces.
            logit_bytes: Most bytes of float32 logits alive at once.
        """
        super().__init__()
        self.model = model
        self._linear_head = linear_head
        self._chunk_tokens = max(64, logit_bytes // (4 * model.config.vocab_size))

    def forward(
        self,
        tokens_BL: torch.Tensor,
        positions_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        factor_BL: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over all labels (nats) and, without gradient, per token (B, L).

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token in its document, int64, starting at 0.
            labels_BL: The next token of the same document, or `IGNORED`, int64.
            factor_BL: What each token's loss counts in the sum; the losses per token are without.
        """
        loss_N = self._token_losses(tokens_BL, positions_BL, labels_BL.reshape(-1))
        counted_N = loss_N if factor_BL is None else loss_N * factor_BL.reshape(-1)
        return counted_N.sum(), loss_N.detach().view(labels_BL.shape)

    def _token_losses(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, labels_N: torch.Tensor
    ) -> torch.Tensor:
        if not self._linear_head:
            out = self.model(input_ids=tokens_BL, position_ids=positions_BL, use_cache=False)
            return _cross_entropy(out.logits.flatten(0, 1), labels_N)
        hidden_BLH = self.model.base_model(
            input_ids=tokens_BL, position_ids=positions_BL, use_cache=False
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1)
        if len(labels_N) <= self._chunk_tokens:
            return self._head_loss(hidden_NH, labels_N)
        # The logits of a piece are made again in the backward pass instead of being kept.
        pieces = [
            checkpoint(self._head_loss, hidden, labels, use_reentrant=False)
            for hidden, labels in zip(
                hidden_NH.split(self._chunk_tokens), labels_N.split(self._chunk_tokens), strict=True
            )
        ]
        return torch.cat([piece for piece in pieces if isinstance(piece, torch.Tensor)])

    def _head_loss(self, hidden_NH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        assert head is not None  # a linear head is one
        return _cross_entropy(head(hidden_NH), labels_N)


def _cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    return functional.cross_entropy(
        logits_NV.to(exact), labels_N, ignore_index=IGNORED, reduction="none"
    )
