"""What to minimize, within what limits, and what came of it.

Shapes: D domains, V targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raymix.laws.table import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A weighted sum of predicted losses, or the worst of them, within limits on the shares.

    Names are those of the law's domains and targets; what is not named has the default.
    """

    weights: Mapping[str, float] | None = None
    """Weight of each target's loss, >= 0; targets not named count nothing. Left out: all alike,
    summing to 1; for minimax 1 each."""
    horizon: float | None = None
    """Steps (in the unit of the table) to be best at; left out: the table's last."""
    minimax: bool = False
    """Minimize the largest weighted loss instead of the sum."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Least share by domain."""
    caps: Mapping[str, float] = field(default_factory=dict)
    """Largest share by domain."""
    available_tokens: Mapping[str, float] = field(default_factory=dict)
    """Tokens each domain holds, for `max_epochs`."""
    max_epochs: float | None = None
    """A domain is read at most so often: cap = max_epochs x available / total_tokens."""
    total_tokens: float | None = None
    """Tokens of the run that is planned, for `max_epochs`."""
    prior: Mapping[str, float] | None = None
    """Shares to stay near to."""
    kl: float = 0.0
    """Weight of KL(shares || prior) in nats, >= 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The best shares found."""

    shares: Mapping[str, float]
    """By domain, summing to 1."""
    losses: Mapping[str, float]
    """Predicted, by target."""
    value: float
    """Of the objective."""
    gap: float | None
    """No shares within the limits have a value more than this below `value`; None: not proved."""
    method: str
    """`closed form` or `convex`, both with a gap that proves them; or `restarts`."""
    restarts: int = 0
    """Starts that were tried, where nothing is proved."""
    agreeing: int = 0
    """How many of them came to the same value, to 1e-6 relative."""
    warnings: tuple[str, ...] = ()
    """Why not to trust it: shares beyond what any run had, losses that cannot be."""

    def document(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "shares": dict(self.shares),
            "losses": dict(self.losses),
            "value": self.value,
            "gap": self.gap,
            "method": self.method,
            "restarts": self.restarts,
            "agreeing": self.agreeing,
            "warnings": list(self.warnings),
        }


def as_array(given: Mapping[str, float], names: tuple[str, ...], default: float) -> Floats:
    """Return values in the order of `names`, `default` where there is none."""
    return np.array([float(given.get(name, default)) for name in names])
