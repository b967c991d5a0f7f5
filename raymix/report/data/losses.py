"""The training losses that `report` and `watch` print, defined once so that they agree.

Three losses are shown of a run, all in nats per token, and each stands beside its label:

- the training loss of a step: of that step's batch, as `train` prints and records it;
- the recent training loss: the mean of those of the last `RECENT_STEPS` steps;
- the held-out loss of a domain: of text that is never trained on, after some step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from raymix.report.data.steps import Steps

RECENT_STEPS = 50
"""Steps that the recent training loss is the mean of, fewer at the beginning of a run."""


class RecentLosses:
    """The training losses of the last `RECENT_STEPS` steps that have one, added in order."""

    def __init__(self) -> None:
        """Begin without a step."""
        self._losses: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, step: int, loss: float) -> None:
        """Append the loss of `step`, nats per token; one that is not finite is left out."""
        # Workers that go on from a checkpoint write some steps again: the later line wins.
        while self._losses and self._losses[-1][0] >= step:
            self._losses.pop()
        if math.isfinite(loss):
            self._losses.append((step, loss))

    def mean(self) -> float:
        """Return the recent training loss, nats per token, NaN without a step."""
        if not self._losses:
            return math.nan
        # fsum is exact, so the mean does not depend on where a reader began.
        return math.fsum(loss for _, loss in self._losses) / len(self._losses)


def recent_losses(steps: Steps) -> RecentLosses:
    """Return the recent training losses of a whole run."""
    recent = RecentLosses()
    # NaN steps are left out, so the last `RECENT_STEPS` lines may be too few.
    for step, loss in zip(steps.step_S.tolist(), steps.loss_S.tolist(), strict=True):
        recent.add(step, loss)
    return recent


def recent_domain_losses(steps: Steps, domains: Iterable[str]) -> dict[str, float]:
    """Return the recent training loss of each domain, nats per token, NaN where there is none.

    The mean is over the last `RECENT_STEPS` steps that read the domain.
    """
    values: dict[str, list[float]] = {name: [] for name in domains}
    missing = len(values)
    for losses in reversed(steps.domain_loss):
        # From the end, as a long run need not be scanned for what its last steps say.
        if not missing:
            break
        if losses is None:
            continue
        for name, loss in zip(losses.names, losses.values, strict=True):
            row = values.get(name)
            if row is not None and math.isfinite(loss) and len(row) < RECENT_STEPS:
                row.append(loss)
                missing -= len(row) == RECENT_STEPS
    return {name: math.fsum(row) / len(row) if row else math.nan for name, row in values.items()}
