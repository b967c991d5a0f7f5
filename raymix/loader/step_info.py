"""Figures of the steps that were read lately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.errors import TrainingError
from raymix.streaming.batches.step_batch import DocumentBatch, StepBatch

# Steps that are remembered: more than any framework reads ahead.
_STEPS = 256


@dataclass(frozen=True, slots=True)
class StepInfo:
    """Figures of one step's global batch."""

    step: int
    """Its number, from 0."""
    shares: dict[str, float]
    """Shares of the domains, by the mixture log."""
    mixture_version: int
    """Version of the log's entry."""
    tokens: dict[str, int]
    """Tokens of each domain that is in the batch, over all ranks."""
    label_tokens: int
    """Tokens that are predicted, over all ranks."""
    batch_hash: str
    """Equal for equal samples in equal order; `raymix train` writes it to `metrics.jsonl`."""


class RecentSteps:
    """The figures of the last steps read.

    Args of the constructor:
        domains: Names of the domains.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = domains
        self._infos: dict[int, StepInfo] = {}

    def add(self, batch: StepBatch | DocumentBatch) -> StepInfo:
        """Return the figures of a step, and remember them."""
        tokens_D = batch.tokens_D
        read = np.flatnonzero(tokens_D).tolist()
        info = self._infos[batch.step] = StepInfo(
            step=batch.step,
            shares=dict(zip(self._domains, batch.shares.tolist(), strict=True)),
            mixture_version=batch.version,
            tokens={self._domains[domain]: int(tokens_D[domain]) for domain in read},
            label_tokens=batch.label_tokens,
            batch_hash=batch.batch_hash,
        )
        self._infos.pop(batch.step - _STEPS, None)
        return info

    def get(self, step: int | None) -> StepInfo:
        """Return the figures of a step, or of the last one.

        Raises:
            TrainingError: If it has not been read, or too long ago.
        """
        number = max(self._infos, default=-1) if step is None else step
        if number not in self._infos:
            raise TrainingError.at(
                "step", number, f"not among the last {_STEPS} steps that were read"
            )
        return self._infos[number]
