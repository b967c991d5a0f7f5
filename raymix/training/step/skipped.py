"""Steps left out, without a finite gradient or a label: their record, and how many are too many.

Legend: D domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymix.errors import TrainingError
from raymix.recipe import TrainConfig


class SkippedSteps:
    """Counts the steps in a row that were left out; the same on all ranks.

    Args of the constructor:
        train: The training recipe: how many steps in a row may be left out, and the learning rate.
        domains: Names of the domains.
    """

    def __init__(self, train: TrainConfig, domains: Sequence[str]) -> None:
        self._limit = train.max_skipped_steps
        self._lr = train.lr
        self._domains = domains
        self._in_a_row = 0
        self._taken, self._left_out = 0, 0

    def add(
        self, step: int, grad_norm: float, nats_D: npt.NDArray[np.float64], labels: int
    ) -> str | None:
        """Return a note if step `step` (1-based) was left out, None if it was not.

        Args:
            step: The step.
            grad_norm: Norm of its gradient.
            nats_D: Summed loss of each domain, over all ranks, shape (D,).
            labels: Labels of the step, over all ranks. Without any it is left out, and says nothing
                about the run: a conversation may be cut before its first answer.

        Raises:
            TrainingError: If more steps in a row were left out than may be.
        """
        if not labels:
            return "none of its tokens is learned"
        if np.isfinite(grad_norm):
            self._in_a_row = 0
            self._taken += 1
            return None
        self._in_a_row += 1
        self._left_out += 1
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

    def check_end(self) -> None:
        """Check, at the last step, that the run has trained.

        Raises:
            TrainingError: If more steps were left out than were taken, since the run last started.
        """
        if self._left_out > self._taken:
            raise TrainingError.at(
                "train.lr",
                self._lr,
                f"{self._left_out} of {self._left_out + self._taken} steps were left out, as their "
                "gradients were not finite: this is no trained model",
                fix="Lower it, warm up longer, or clip harder",
            )


def non_finite_domains(nats_D: npt.NDArray[np.float64], names: Sequence[str]) -> str:
    """Return ` of NAMES` of the domains whose loss is not finite; empty where all or none are."""
    lost = [names[d] for d in np.flatnonzero(~np.isfinite(nats_D)).tolist()]
    return f" of {', '.join(lost)}" if 0 < len(lost) < len(names) else ""
