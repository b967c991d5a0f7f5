"""What a step adds up over ranks: its loss, who asked for what, and each domain's loss.

One float64 vector per step travels, so that metrics cost one small sum and a decision of rank 0
(a checkpoint is due, a stop was asked for) reaches every rank at the same step with it. Letters:
D domains, B rows, L tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raymix.training.model.loss import IGNORED
from raymix.training.model.parallel import PendingSum, World
from raymix.training.step.batches import MicroBatchTensors

Domains = npt.NDArray[np.integer]

_HEAD = 3


@dataclass(frozen=True, slots=True)
class StepSums:
    """The sums of one step over all ranks."""

    loss: float
    """Summed loss in nats."""
    checkpoint: bool
    """Rank 0 wants a checkpoint."""
    stop: bool
    """Rank 0 wants to stop."""
    nats_D: npt.NDArray[np.float64]
    """Summed loss of each domain, shape (D,)."""
    labels_D: npt.NDArray[np.float64]
    """Labels of each domain, shape (D,)."""


class StepMetrics:
    """Adds up one step on this rank, then over all ranks."""

    def __init__(self, n_domains: int, world: World) -> None:
        """Start from zero."""
        self._world = world
        self._n_domains = n_domains
        size = _HEAD + 2 * n_domains
        self._sums = torch.zeros(size, dtype=torch.float64, device=world.device)

    def add(self, batch: MicroBatchTensors, domains: Domains, loss_BL: torch.Tensor) -> None:
        """Add a micro-batch.

        Args:
            batch: The micro-batch; its `rows` pick from `domains`.
            domains: Domain of each of the rank's rows, shape (B,), or of each token, (B, L); -1
                where there is none.
            loss_BL: Loss of every token.
        """
        nats = loss_BL.double()
        labels = (batch.labels_BL != IGNORED).double()
        self._sums[0] += nats.sum()
        own = torch.from_numpy(domains[batch.rows].astype(np.int64)).to(nats.device)
        if not len(own):  # a stand-in
            return
        if own.ndim == 1:
            nats, labels = nats.sum(1), labels.sum(1)
        # What is of no domain (padding) has neither loss nor labels, so any domain will do.
        index, both_2N = own.clamp(min=0).flatten(), torch.stack([nats, labels]).flatten(1)
        self._sums[_HEAD:].view(2, -1).index_add_(1, index, both_2N)

    def start(self, *, checkpoint: bool, stop: bool) -> PendingStep:
        """Return the sum over ranks, under way; the two wishes count on rank 0 only."""
        if self._world.is_writer and (checkpoint or stop):
            self._sums[1], self._sums[2] = float(checkpoint), float(stop)
        return PendingStep(PendingSum(self._sums, self._world), self._n_domains)


class PendingStep:
    """The sums of a step, under way."""

    def __init__(self, pending: PendingSum, n_domains: int) -> None:
        """Hold on to a sum that was started."""
        self._pending = pending
        self._n_domains = n_domains

    def result(self) -> StepSums:
        """Return the sums; waits for them."""
        values = self._pending.result().numpy()
        nats_D, labels_D = values[_HEAD:].reshape(2, self._n_domains)
        return StepSums(
            float(values[0]), bool(values[1] > 0), bool(values[2] > 0), nats_D, labels_D
        )
