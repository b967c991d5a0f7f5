"""User-facing objective and optimum of a search over shares.

Both are by name, for recipes and JSON; `feasible` has the same in arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raymix.laws.table import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A weighted sum of predicted losses, or their maximum, within limits on the shares.

    Names are those of the law's domains and targets; names left out have the default.
    """

    weights: Mapping[str, float] | None = None
    """Weight of each target's loss, >= 0; targets left out have weight 0. Default: equal weights
    that sum to 1; for minimax 1 each."""
    horizon: float | None = None
    """Steps (in the unit of the table) at which losses are minimized; default: the last step."""
    minimax: bool = False
    """Minimize the largest weighted loss instead of the sum."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Smallest share by domain."""
    caps: Mapping[str, float] = field(default_factory=dict)
    """Largest share by domain."""
    available_tokens: Mapping[str, float] = field(default_factory=dict)
    """Tokens in each domain, for `max_epochs`."""
    max_epochs: float | None = None
    """Largest number of passes over a domain: cap = max_epochs x available / total_tokens."""
    total_tokens: float | None = None
    """Tokens of the planned run, for `max_epochs`."""
    prior: Mapping[str, float] | None = None
    """Prior shares of the KL penalty."""
    kl: float = 0.0
    """Weight of KL(shares || prior) in nats, >= 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The best shares of a search."""

    shares: Mapping[str, float]
    """Shares by domain, summing to 1."""
    losses: Mapping[str, float]
    """Predicted losses by target."""
    value: float
    """Value of the objective."""
    gap: float | None
    """No allowed shares have a value more than this below `value`; None: not proved."""
    method: str
    """`closed form` or `convex`, both proved by a gap; or `restarts`."""
    restarts: int = 0
    """Number of descents of `restarts`."""
    agreeing: int = 0
    """Number of descents that reached the same value, to 1e-6 relative."""
    warnings: tuple[str, ...] = ()
    """Reasons for doubt: shares larger than in any run, impossible losses."""

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


def as_array(values: Mapping[str, float], names: tuple[str, ...], default: float) -> Floats:
    """Return the values in the order of `names`, `default` for names without a value."""
    return np.array([float(values.get(name, default)) for name in names])
