"""All-reduced metrics of a step: loss, loss by domain, and rank 0's stop and checkpoint flags.

One float64 vector per step is all-reduced, so metrics cost one small collective, and a decision of
rank 0 reaches every rank at the same step. Axes: D domains, B rows, L tokens per row.
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

# Loss, checkpoint flag, stop flag; then nats and labels by domain.
_HEAD = 3


@dataclass(frozen=True, slots=True)
class StepSums:
    """The sums of one step over all ranks."""

    loss: float
    """Summed loss in nats."""
    checkpoint: bool
    """Rank 0 requests a checkpoint."""
    stop: bool
    """Rank 0 requests a clean stop."""
    nats_D: npt.NDArray[np.float64]
    """Summed loss of each domain, shape (D,)."""
    labels_D: npt.NDArray[np.float64]
    """Labels of each domain, shape (D,)."""


class StepMetrics:
    """Sums the losses of one step on this rank, then over all ranks."""

    def __init__(self, n_domains: int, world: World) -> None:
        """Start from zero."""
        self._world = world
        self._n_domains = n_domains
        size = _HEAD + 2 * n_domains
        # float64: a step sums millions of losses, and the mixers compare small differences.
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
        if not len(own):  # a micro-batch that only keeps ranks in step
            return
        if own.ndim == 1:
            nats, labels = nats.sum(1), labels.sum(1)
        # Padding (domain -1) has neither loss nor labels, so adding it to domain 0 adds zeros.
        index, both_2N = own.clamp(min=0).flatten(), torch.stack([nats, labels]).flatten(1)
        self._sums[_HEAD:].view(2, -1).index_add_(1, index, both_2N)

    def start(self, *, checkpoint: bool, stop: bool) -> PendingMetrics:
        """Start the all-reduce and return it; the flags of rank 0 alone count."""
        if self._world.is_writer and (checkpoint or stop):
            self._sums[1], self._sums[2] = float(checkpoint), float(stop)
        return PendingMetrics(PendingSum(self._sums, self._world), self._n_domains)


class PendingMetrics:
    """The all-reduce of a step's sums, in flight."""

    def __init__(self, pending: PendingSum, n_domains: int) -> None:
        """Wrap a started all-reduce."""
        self._pending = pending
        self._n_domains = n_domains

    def result(self) -> StepSums:
        """Wait for the all-reduce and return the sums."""
        values = self._pending.result().numpy()
        nats_D, labels_D = values[_HEAD:].reshape(2, self._n_domains)
        return StepSums(
            float(values[0]), bool(values[1] > 0), bool(values[2] > 0), nats_D, labels_D
        )
