"""What the runs of a table had, so that advice beyond it is marked as such.

Shapes: D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymix.laws.table import Floats, MixtureTable

_RELATIVE = 0.05
_ABSOLUTE = 1e-3
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """Ranges of shares and steps in a table."""

    low_D: Floats
    """Least share of each domain in any run, shape (D,)."""
    high_D: Floats
    """Largest share of each domain in any run, shape (D,)."""
    last_step: float | None = None
    """The last step that was measured."""

    @classmethod
    def of(cls, table: MixtureTable) -> Seen:
        """Return the ranges of a table."""
        return cls(
            low_D=table.share_RD.min(axis=0),
            high_D=table.share_RD.max(axis=0),
            last_step=None if table.step_R is None else float(table.step_R.max()),
        )

    def document(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "low": self.low_D.tolist(),
            "high": self.high_D.tolist(),
            "last_step": self.last_step,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Seen:
        """Return the ranges that `document` described."""
        low_D, high_D = np.array(document["low"], float), np.array(document["high"], float)
        return cls(low_D=low_D, high_D=high_D, last_step=document["last_step"])

    def warnings(
        self, share_D: Floats, domains: Sequence[str], horizon: float | None
    ) -> tuple[str, ...]:
        """Return a sentence for each way in which shares or a horizon leave the ranges."""
        far = [
            (float(share_D[at]), f"{domains[at]} ({share_D[at]:.3g}, {most} {edge_D[at]:.3g})")
            for most, edge_D, out_D in (
                ("at most", self.high_D, share_D - self.high_D * (1 + _RELATIVE) - _ABSOLUTE),
                ("at least", self.low_D, self.low_D * (1 - _RELATIVE) - _ABSOLUTE - share_D),
            )
            for at in np.flatnonzero(out_D > 0).tolist()
        ]
        found = []
        if far:
            named = ", ".join(text for _, text in sorted(far, reverse=True)[:_MOST_NAMED])
            more = f" and {len(far) - _MOST_NAMED} more" if len(far) > _MOST_NAMED else ""
            found.append(f"shares beyond what any run had: {named}{more}; cap them, or run there")
        if horizon is not None and self.last_step is not None and horizon > self.last_step:
            times = horizon / self.last_step
            found.append(f"a horizon {times:.3g} times the last step that was measured")
        return tuple(found)
