"""Switches a model to the attention of `raymix.context_parallel`, where both compute the same.

Legend: L tokens per row, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raymix.context_parallel import (
    ContextParallelGroups,
    DocumentPart,
    LocalShards,
    attending,
    register,
)
from raymix.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Part of the effect of attention beyond a document: in a new model that is as small as 1e-4 of the
# logits, and rounding 1e-7.
_TOLERANCE = 1e-2


@torch.no_grad()
def switch_attention(model: PreTrainedModel, *, longest: int) -> bool:
    """Switch the model to the attention of `raymix.context_parallel`; return whether it can.

    Tested on a row of two four-token documents, declared to be up to `longest` tokens long, so
    that a sliding window shorter than these counts. A model whose logits change keeps its own:
    changes are measured by that of one document in place of two, as the logits of a new model
    hardly depend on attention.
    """
    original, was_training = model.config._attn_implementation, model.training
    two_documents, one_document = (
        LocalShards([DocumentPart(4, (0,))] * 2, 0, ContextParallelGroups()),
        LocalShards([DocumentPart(8, (0,))], 0, ContextParallelGroups()),
    )
    two_documents.longest = longest
    row = _two_documents(model)
    try:
        expected_LV = _logits(model.eval(), *row)
        model.set_attn_implementation(register())
        with attending(two_documents):
            # In training mode for dropout, which the new attention refuses.
            _logits(model.train(), *row)
            change = _largest(_logits(model.eval(), *row) - expected_LV)
        # As one document the logits must differ; else the model ignores the new attention.
        with attending(one_document):
            effect = _largest(_logits(model, *row) - expected_LV)
        # False for NaN, too.
        same = change < _TOLERANCE * effect
    except (TrainingError, ValueError, KeyError):
        same = False
    finally:
        model.train(was_training)
    if not same and original is not None:
        model.set_attn_implementation(original)
    return same


def _two_documents(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and positions of a row of two four-token documents."""
    # Modulo: a test's vocabulary may have fewer than eight tokens.
    numbers_L = torch.arange(8, device=next(model.parameters()).device)
    return numbers_L % model.config.vocab_size, numbers_L % 4


def _logits(
    model: PreTrainedModel, tokens_L: torch.Tensor, positions_L: torch.Tensor
) -> torch.Tensor:
    out = model(input_ids=tokens_L[None], position_ids=positions_L[None], use_cache=False)
    return out.logits[0].float()


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())
