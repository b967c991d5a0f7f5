"""Registration of context-parallel attention with Hugging Face transformers.

    model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    with attending(shards):
        loss = model(input_ids=row, position_ids=positions).logits ...
        loss.backward()

Outside of `attending` a model runs `sdpa`, so one model serves for training on schedules and for
evaluation on rows.
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

# Process-wide and not thread-local: autograd recomputes checkpointed layers on its own threads.
# A stack, as contexts may nest; the innermost counts.
_ACTIVE_SHARDS: list[LocalShards] = []


@contextmanager
def attending(shards: LocalShards) -> Iterator[None]:
    """Make registered models attend to `shards` in the forward and backward passes inside."""
    _ACTIVE_SHARDS.append(shards)
    try:
        yield
    finally:
        _ACTIVE_SHARDS.pop()


def register() -> str:
    """Register the attention with transformers and return its name; idempotent."""
    # Imported here: transformers takes seconds to import, and `attention` works without it.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(*args: Any, **options: Any) -> Any:
        # The segments replace the mask; a dense one would take memory quadratic in the row.
        return None if _ACTIVE_SHARDS else sdpa_mask(*args, **options)

    # Dynamo would try to trace collectives and global state, and recompile for each micro-batch.
    # Not as a decorator: that would load Dynamo, which takes a second, with this module.
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(_forward))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    return NAME


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of one layer, (1, T, H, D), by the interface of transformers.

    Raises:
        TrainingError: If the layer needs a feature that is missing here: dropout, a window shorter
            than a document, or capped scores.
    """
    if not _ACTIVE_SHARDS:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    shards = _ACTIVE_SHARDS[-1]
    _check_options(shards, options)
    device_type = query.device.type
    # Autocast casts the inputs of torch's own operations, not those of an autograd.Function.
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    # transformers passes (1, H, T, D); a micro-batch is a single row.
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attention(query, key, value, shards, scale=options.get("scaling"))[None], None


def _check_options(shards: LocalShards, options: dict[str, Any]) -> None:
    if options.get("dropout"):
        raise TrainingError.at(
            "attention.dropout",
            options["dropout"],
            "not supported",
            fix="Set the model's attention dropout to 0",
        )
    window = options.get("sliding_window")
    # A window that no document exceeds masks nothing beyond the causal mask.
    if window is not None and shards.longest > window:
        raise TrainingError.at(
            "attention.sliding_window",
            window,
            f"shorter than a document of {shards.longest} tokens",
            fix="Lower data.sequence_length to the model's window, or take a model without one",
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise TrainingError.at(f"attention.{name}", "given", "not supported")
