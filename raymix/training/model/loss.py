"""The loss of rows of documents: cross-entropy summed over label tokens, with the head in chunks.

The logits of a large vocabulary take more memory than the rest of a forward pass, so they are
computed for a chunk of tokens at a time, and again in the backward pass.

Legend: B rows, L tokens per row, N = B * L, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from raymix.training.model.facts import Isolation
from raymix.training.model.row_inputs import document_rows, packed_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
"""The label of a position without one; -100 is `ignore_index`' default in torch."""

MAX_LOGIT_BYTES = 256 * 1024**2
"""Maximum bytes of float32 logits at once; beyond that the head is applied in chunks."""


class PackedLoss(nn.Module):
    """A causal LM with its loss, in one `forward`, where DDP and FSDP2 have their hooks."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        linear_head: bool,
        isolation: Isolation = "positions",
        logit_bytes: int = MAX_LOGIT_BYTES,
    ) -> None:
        """Wrap `model`.

        Args:
            model: The causal LM.
            linear_head: Whether its logits are the output embedding of the last hidden state;
                if not, they cannot be computed in chunks.
            isolation: How the model keeps documents of one row apart.
            logit_bytes: Maximum bytes of float32 logits at once.
        """
        super().__init__()
        self.model = model
        self._linear_head = linear_head
        self.isolation: Isolation = isolation
        # At least 64: smaller matrix products would be slower than the memory is worth.
        self._chunk_tokens = max(64, logit_bytes // (4 * model.config.vocab_size))

    def forward(
        self,
        tokens_BL: torch.Tensor,
        positions_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        loss_weight_BL: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over all labels (nats) and, without gradient, per token (B, L).

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token in its document, int64, starting at 0.
            labels_BL: The next token of the same document, or `IGNORED`, int64.
            loss_weight_BL: Factor of each token's loss in the sum; losses per token are without.
        """
        if self.isolation == "rows":
            loss_N = self._by_document(tokens_BL, positions_BL, labels_BL.reshape(-1))
        else:
            inputs = packed_inputs(self.model, self.isolation, positions_BL)
            loss_N = self._token_losses(tokens_BL, inputs, labels_BL.reshape(-1))
        # A sum and not a mean: the loop divides by the labels of the global batch.
        weighted_N = loss_N if loss_weight_BL is None else loss_N * loss_weight_BL.reshape(-1)
        return weighted_N.sum(), loss_N.detach().view(labels_BL.shape)

    def _by_document(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, labels_N: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each token, shape (N,), of documents that are rows of their own."""
        tokens_N = tokens_BL.flatten()
        losses: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for place_RT, inside_RT in document_rows(positions_BL):
            # Padding is to the right, where no token of a causal model sees it.
            labels_RT = labels_N[place_RT].masked_fill(~inside_RT, IGNORED)
            loss_M = self._token_losses(tokens_N[place_RT], {}, labels_RT.flatten())
            losses.append(loss_M[inside_RT.flatten()])
            places.append(place_RT[inside_RT])
        return torch.cat(losses)[torch.cat(places).argsort()]

    def _token_losses(
        self, tokens_BL: torch.Tensor, inputs: dict[str, Any], labels_N: torch.Tensor
    ) -> torch.Tensor:
        if not self._linear_head:
            out = self.model(input_ids=tokens_BL, use_cache=False, **inputs)
            return _cross_entropy(out.logits.flatten(0, 1), labels_N)
        hidden_BLH = self.model.base_model(
            input_ids=tokens_BL, use_cache=False, **inputs
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1)
        if len(labels_N) <= self._chunk_tokens:
            return self._head_loss(hidden_NH, labels_N)
        # Checkpointed: the logits of a chunk are recomputed in the backward pass, not stored.
        losses = [
            checkpoint(self._head_loss, hidden, labels, use_reentrant=False)
            for hidden, labels in zip(
                hidden_NH.split(self._chunk_tokens), labels_N.split(self._chunk_tokens), strict=True
            )
        ]
        return torch.cat([loss for loss in losses if isinstance(loss, torch.Tensor)])

    def _head_loss(self, hidden_NH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        assert head is not None
        return _cross_entropy(head(hidden_NH), labels_N)


def _cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    # At least float32: a log-sum-exp over a vocabulary in bf16 has three digits. Promoted and not
    # cast, so that float64 models of the tests stay exact.
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return functional.cross_entropy(
        logits_NV.to(dtype), labels_N, ignore_index=IGNORED, reduction="none"
    )
