"""Tests of a model before it trains: whether documents in a row see each other, and its head.

A document that sees another has a gradient with respect to the other's embeddings. Masked scores
have a probability of exactly 0, so this gradient is exactly 0 where documents are apart, whatever
the weights are; logits of a new model differ by less than the rounding of a trained one.

Legend: B rows, L tokens per row, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from raymix.errors import TrainingError
from raymix.training.model.facts import Isolation, ModelTraits
from raymix.training.model.row_inputs import document_rows, packed_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Float32 kernels differ by some 1e-6; positions that do not restart change logits by more than 0.1
# where weights have a gain of 1.
_TOLERANCE = 1e-3
# Two rows of two documents, of which one is longer and one shorter in each: a mask that is made
# from the first row alone shows. Longer than convolutions (4) and windows of small models.
_LENGTH, _FIRST_TOKENS = 16, (5, 9)


def probe_model(model: PreTrainedModel) -> ModelTraits:
    """Return the model's traits, tested on two rows of two documents; its weights do not change.

    Raises:
        TrainingError: If the model cannot be tested.
    """
    was_training = model.training
    model.eval()
    try:
        tokens_BL, positions_BL = _rows(model)
        isolation: Isolation = "rows"
        ways: tuple[Isolation, ...] = ("positions", "masks")
        for way in ways:
            # A model that does not take an argument raises whatever its code meets.
            try:
                apart = _isolates(model, way, tokens_BL, positions_BL)
            except Exception:  # noqa: BLE001 - the next way may work, rows of their own do
                continue
            if apart:
                isolation = way
                break
        causal = _is_causal(model, tokens_BL)
        return ModelTraits(isolation, causal, _linear_head(model, isolation))
    finally:
        model.train(was_training)


def _rows(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and positions of two rows of two documents, (B, L) each."""
    device = next(model.parameters()).device
    # Modulo: a test's vocabulary may be smaller.
    tokens_BL = torch.arange(2 * _LENGTH, device=device).view(2, _LENGTH) % model.config.vocab_size
    offset_L = torch.arange(_LENGTH, device=device)
    positions = [torch.where(offset_L < n, offset_L, offset_L - n) for n in _FIRST_TOKENS]
    return tokens_BL, torch.stack(positions)


def _isolates(
    model: PreTrainedModel, way: Isolation, tokens_BL: torch.Tensor, positions_BL: torch.Tensor
) -> bool:
    """Return whether documents are as if they were alone: by gradients, and by logits."""
    first = torch.tensor(_FIRST_TOKENS, device=tokens_BL.device)[:, None]
    second_BL = torch.arange(_LENGTH, device=tokens_BL.device) >= first
    inputs = packed_inputs(model, way, positions_BL)
    with _embeddings(model) as embedded, torch.enable_grad():
        logits_BLV = _logits(model, tokens_BL, inputs)
    for part_BL in (second_BL, ~second_BL):
        gradient_BL = _gradient(logits_BLV, part_BL, embedded[0])
        # Also false for NaN.
        if not (gradient_BL[part_BL] > 0).all() or not (gradient_BL[~part_BL] == 0).all():
            return False
    return _as_alone(model, tokens_BL, positions_BL, logits_BLV.detach())


@torch.no_grad()
def _as_alone(
    model: PreTrainedModel,
    tokens_BL: torch.Tensor,
    positions_BL: torch.Tensor,
    logits_BLV: torch.Tensor,
) -> bool:
    """Return whether logits are those of the documents alone: positions restart, too."""
    packed_NV, tokens_N = logits_BLV.flatten(0, 1), tokens_BL.flatten()
    for place_RT, _ in document_rows(positions_BL):
        for place_T in place_RT:
            place_T = place_T.unique()
            alone_TV = _logits(model, tokens_N[place_T][None], {})[0]
            if not _close(alone_TV, packed_NV[place_T]):
                return False
    return True


def _is_causal(model: PreTrainedModel, tokens_BL: torch.Tensor) -> bool:
    """Return whether the first half of each row has no gradient at the second."""
    early_BL = torch.arange(_LENGTH, device=tokens_BL.device).expand_as(tokens_BL) < _LENGTH // 2
    with _embeddings(model) as embedded, torch.enable_grad():
        logits_BLV = _logits(model, tokens_BL, {})
    gradient_BL = _gradient(logits_BLV, early_BL, embedded[0])
    return bool((gradient_BL[~early_BL] == 0).all())


@torch.no_grad()
def _linear_head(model: PreTrainedModel, isolation: Isolation) -> bool:
    # Some types scale or cap the logits (Gemma 2), or have no head module at all.
    head = model.get_output_embeddings()
    # Some have no model below the head under the name that they give, and return themselves.
    if head is None or model.base_model is model:
        return False
    tokens_BL, positions_BL = _rows(model)
    inputs = packed_inputs(model, isolation, positions_BL)
    outputs: list[torch.Tensor] = []

    def collect(module: Any, args: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    hook = head.register_forward_hook(collect)
    try:
        logits_BLV = _logits(model, tokens_BL, inputs)
        body = model.base_model(input_ids=tokens_BL, use_cache=False, **inputs)
        hidden_BLH = getattr(body, "last_hidden_state", None)
        if len(outputs) != 1 or hidden_BLH is None:
            return False
        # Bit-equal: a cap changes the small logits of a new model by less than any tolerance.
        same = outputs[0].shape == logits_BLV.shape and torch.equal(outputs[0].float(), logits_BLV)
        return same and _close(head(hidden_BLH), logits_BLV)
    finally:
        hook.remove()


@contextmanager
def _embeddings(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect the embedded tokens of a forward pass inside, each a leaf that gets a gradient."""
    leaves: list[torch.Tensor] = []

    def detach(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        # Not the leaf itself: some models scale embeddings in place.
        return leaf.clone()

    embedding: Any = model.get_input_embeddings()
    hook = embedding.register_forward_hook(detach)
    try:
        yield leaves
        if not leaves:
            raise TrainingError.at(
                "model.type", model.config.model_type, "it does not use its input embeddings"
            )
    finally:
        hook.remove()


def _gradient(
    logits_BLV: torch.Tensor, part_BL: torch.Tensor, embedded_BLH: torch.Tensor
) -> torch.Tensor:
    """Return the largest gradient of a part's logits at each embedded token, shape (B, L)."""
    # Any weights but equal ones, of which the softmax' gradient is 0.
    weight_V = torch.arange(logits_BLV.shape[-1], device=logits_BLV.device).float().sin()
    total = (logits_BLV * weight_V)[part_BL].sum()
    (gradient_BLH,) = torch.autograd.grad(total, embedded_BLH, retain_graph=True)
    return gradient_BLH.abs().amax(-1)


def _logits(
    model: PreTrainedModel, tokens_BL: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    logits_BLV: torch.Tensor = model(input_ids=tokens_BL, use_cache=False, **inputs).logits
    return logits_BLV.float()


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(
        torch.allclose(left.float(), right.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
    )
