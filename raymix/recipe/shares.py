"""Base of the mixers' recipe models: shares by domain name, and targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from raymix.recipe.base import Fault, FieldDescription, Number, RecipeModel

Weights = dict[str, Annotated[Number, Field(ge=0)]]
# Wider than rounding to six digits by hand over a few domains, far below any share that matters.
SUM_TOLERANCE = 1e-6


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(_listed, json_schema_input_type=tuple[Name, ...] | Name),
    FieldDescription("a domain or a list of domains"),
]


class MixerModel(RecipeModel):
    """Fields of every mixer."""

    kind: str
    """Selects the mixer."""
    targets: Names = ()
    """Domains to measure and never to train on: their share is 0, whatever the mixer."""

    def shares(self) -> dict[str, Mapping[str, float]]:
        """Return the mappings of domains to shares, by field; a target may have none in them."""
        return {}

    def values(self) -> dict[str, Mapping[str, float]]:
        """Return the mappings of domains to anything else, by field."""
        return {}


def sum_fault(field: str, weights: dict[str, float]) -> Fault | None:
    """Return the fault of shares that do not sum to 1, if they do not."""
    # fsum: the error of a plain sum over 10,000 domains exceeds the tolerance.
    total = math.fsum(weights.values())
    if abs(total - 1) <= SUM_TOLERANCE:
        return None
    wrong = f"the shares sum to {total:.9g}, not 1"
    advice = f"Divide each by {total:.9g}" if total > 0 else "Give at least one domain a share"
    return Fault(field, weights, wrong, (f"A sum within {SUM_TOLERANCE:g} of 1 is allowed", advice))
