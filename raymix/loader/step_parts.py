"""The parts in which a step is handed out."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from raymix.loader.checks import check_options
from raymix.loader.step_info import RecentSteps
from raymix.loader.tensors import Layout, batch_tensors, pinned, variable_length
from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch


class StepParts:
    """Makes the parts of a step from its batch; called on the reader's thread.

    Args of the constructor: those of `MixtureLoader` of the same names.

    Attributes:
        recent: Figures of the steps made last.

    Raises:
        RecipeError: If options are wrong or do not go together.
    """

    recent: RecentSteps

    def __init__(
        self,
        *,
        micro_batches: int,
        layout: Layout,
        varlen: bool,
        pin_memory: bool,
        world_size: int,
    ) -> None:
        check_options(micro_batches, layout, varlen=varlen)
        self._micro_batches = micro_batches
        self._layout: Layout = layout
        self._varlen = varlen
        self._pin_memory = pin_memory
        self._world_size = world_size

    def __call__(
        self, batch: StepBatch | DocumentBatch, factors: list[float] | None
    ) -> deque[dict[str, Any]]:
        """Return the parts of a batch, given the factors of the domains' losses or None."""
        info = self.recent.add(batch)
        items = torch.tensor(max(1, info.label_tokens) / self._world_size)
        parts: deque[dict[str, Any]] = deque()
        for part in batch_tensors(batch, self._micro_batches, self._layout):
            part["num_items_in_batch"] = items
            if factors is not None:
                weights = torch.tensor(factors, dtype=torch.float32)
                part["loss_weights"] = weights[part["domain_ids"].clamp(min=0)]
            if self._varlen:
                part |= variable_length(part["position_ids"])
            parts.append(pinned(part) if self._pin_memory else part)
        return parts
