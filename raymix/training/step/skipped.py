"""Steps left out because their gradient is not finite: their record, and how many are too many.

Legend: D domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymix.errors import TrainingError


class SkippedSteps:
    """Counts the steps in a row that were left out; the same on all ranks.

    Args of the constructor:
        limit: Steps in a row that may be left out: `train.max_skipped_steps`.
        domains: Names of the domains.
    """

    def __init__(self, limit: int, domains: Sequence[str]) -> None:
        self._limit = limit
        self._domains = domains
        self._in_a_row = 0

    def add(self, step: int, grad_norm: float, nats_D: npt.NDArray[np.float64]) -> str | None:
        """Return a note if step `step` (1-based) was left out, None if it was not.

        Args:
            step: The step.
            grad_norm: Norm of its gradient.
            nats_D: Summed loss of each domain, over all ranks, shape (D,).

        Raises:
            TrainingError: If more steps in a row were left out than may be.
        """
        if np.isfinite(grad_norm):
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        domains = non_finite_domains(nats_D, self._domains)
        note = f"its gradient norm is {grad_norm:g}"
        note += f", the loss{domains} is not finite" if not np.isfinite(nats_D).all() else ""
        if self._in_a_row > self._limit:
            raise TrainingError.at(
                "train.max_skipped_steps",
                self._limit,
                f"{self._in_a_row} steps in a row were left out, the last is step {step:,}: {note}",
                fix="Lower train.lr, warm up longer, clip harder, or look at the data of these "
                "steps. `raymix train RECIPE --from-step N` goes on from an earlier checkpoint",
            )
        return note


def non_finite_domains(nats_D: npt.NDArray[np.float64], names: Sequence[str]) -> str:
    """Return ` of NAMES` of the domains whose loss is not finite; empty where all or none are."""
    lost = [names[d] for d in np.flatnonzero(~np.isfinite(nats_D)).tolist()]
    return f" of {', '.join(lost)}" if 0 < len(lost) < len(names) else ""
