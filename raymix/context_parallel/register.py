"""The attention of `raymix.context_parallel` under a name that Hugging Face models know.

    model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    with attending(held):
        loss = model(input_ids=row, position_ids=positions).logits ...
        loss.backward()

Outside of `attending` a model does what `sdpa` would, so one model serves for training on
schedules and for evaluation on rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raymix.context_parallel.attention import attention
from raymix.context_parallel.local_shards import LocalShards
from raymix.errors import TrainingError

NAME = "raymix_cp"

# Of the process and not of the thread: autograd computes checkpointed layers again in its own.
_PRESENT: list[LocalShards] = []


@contextmanager
def attending(held: LocalShards) -> Iterator[None]:
    """Tell the models what the micro-batch holds, in forward and backward pass."""
    _PRESENT.append(held)
    try:
        yield
    finally:
        _PRESENT.pop()


def register() -> str:
    """Make the attention known to transformers, and return its name; again changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(*args: Any, **options: Any) -> Any:
        # What may see what is known from the documents: no mask is made, whatever the length.
        return None if _PRESENT else sdpa_mask(*args, **options)

    ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    return NAME


@torch.compiler.disable
def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of one layer, (1, T, H, D), as transformers asks for it.

    Raises:
        TrainingError: If the layer wants what this attention has not: dropout, a window shorter
            than a document, or capped scores.
    """
    if not _PRESENT:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    held = _PRESENT[-1]
    _refuse(held, options)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        query, key, value = (part.to(wanted) for part in (query, key, value))
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return attention(query, key, value, held, scale=options.get("scaling"))[None], None


def _refuse(held: LocalShards, options: dict[str, Any]) -> None:
    if options.get("dropout"):
        raise TrainingError.at(
            "attention.dropout",
            options["dropout"],
            "not supported",
            fix="Set the model's attention dropout to 0",
        )
    window = options.get("sliding_window")
    if window is not None and held.longest > window:
        raise TrainingError.at(
            "attention.sliding_window",
            window,
            f"shorter than a document of {held.longest} tokens",
            fix="Lower data.sequence_length to the model's window, or take a model without one",
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise TrainingError.at(f"attention.{name}", "given", "not supported")
