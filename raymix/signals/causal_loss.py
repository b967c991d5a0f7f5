"""`CausalLoss`: the loss of any causal LM, in the form that `GradientProbe` measures.

Legend: B rows, L tokens per row, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from raymix.errors import TrainingError


class CausalLoss(nn.Module):
    """Sums the cross-entropy of the logits of a causal LM over its label tokens.

    The model is called as `model(input_ids=tokens_BL, position_ids=positions_BL)`, without the
    positions if it takes none. It returns logits of shape (B, L, V): a tensor, an object or a
    mapping with `logits`, or a tuple that begins with them. A loss that it returns beside them is
    not used, as it has no value per token.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`.

        Raises:
            ValueError: If its `forward` has no argument `input_ids`.
        """
        super().__init__()
        self.model = model
        named, takes_any = _arguments(model)
        if "input_ids" not in named and not takes_any:
            raise ValueError(f"{type(model).__name__}.forward has no argument input_ids")
        self._takes_positions = takes_any or "position_ids" in named
        # With a cache, transformers lets packed documents see each other. A wrapper such as peft's
        # passes the option on without naming it.
        takes_option = "use_cache" in named or (takes_any and hasattr(model, "config"))
        self._options = {"use_cache": False} if takes_option else {}

    def forward(
        self, tokens_BL: Tensor, positions_BL: Tensor, labels_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss summed over all labels (nats) and, without gradient, per token (B, L).

        Args:
            tokens_BL: Token ids, int64.
            positions_BL: Position of each token in its document, int64, starting at 0.
            labels_BL: The next token of the same document, int64; below 0 for none.

        Raises:
            TrainingError: If the model returns no logits of shape (B, L, V).
            ValueError: If rows hold several documents and the model takes no positions.
        """
        options: dict[str, Any] = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = positions_BL
        elif bool((positions_BL[:, 1:] == 0).any()):
            raise ValueError(
                f"{type(self.model).__name__}.forward has no argument position_ids, and without"
                " positions the documents of a row are not separated. Use one document per row"
            )
        logits_BLV = _logits(self.model(input_ids=tokens_BL, **options))
        if not isinstance(logits_BLV, Tensor) or logits_BLV.shape[:-1] != labels_BL.shape:
            shape = tuple(logits_BLV.shape) if isinstance(logits_BLV, Tensor) else None
            raise TrainingError.at(
                "signals.model",
                type(self.model).__name__,
                f"it returned no logits of shape {(*labels_BL.shape, 'vocabulary')}, but {shape}",
                fix="Give the probe a module that returns the summed loss and the loss per token",
            )
        # At least float32: a log-sum-exp over a vocabulary in bfloat16 has three digits.
        dtype = torch.promote_types(logits_BLV.dtype, torch.float32)
        loss_N = functional.cross_entropy(
            logits_BLV.flatten(0, 1).to(dtype),
            labels_BL.flatten().clamp_min(-1),
            ignore_index=-1,
            reduction="none",
        )
        return loss_N.sum(), loss_N.detach().view(labels_BL.shape)


def loss_module(model: nn.Module) -> nn.Module:
    """Return the module whose call gives the loss: `model`, or a `CausalLoss` around it."""
    # DDP's own forward would wait for gradients that a measurement does not make.
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return CausalLoss(model) if "input_ids" in _arguments(model)[0] else model


def _arguments(model: nn.Module) -> tuple[frozenset[str], bool]:
    """Return the names of the arguments of `forward`, and whether it takes any other."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return frozenset(each.name for each in parameters), takes_any


def _logits(result: Any) -> Any:
    if isinstance(result, Mapping):
        return result.get("logits")
    if isinstance(result, tuple):
        return result[0] if result else None
    return getattr(result, "logits", result)
