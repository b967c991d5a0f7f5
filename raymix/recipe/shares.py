"""Base of the mixers' recipe models: shares by domain name, and targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from raymix.recipe.base import Fault, FieldDescription, Number, RecipeModel

Weights = dict[str, Annotated[Number, Field(ge=0)]]
# A sum further from 1 is no matter of the last digits: the user learns that it divides the shares.
SUM_TOLERANCE = 1e-6
# Published mixtures are rounded to two or three places; a forgotten domain changes more.
ROUNDING_TOLERANCE = 0.01


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


def sum_fault(
    field: str, weights: Mapping[str, float], *, relative: bool = False, ratios: bool = False
) -> Fault | None:
    """Return the fault of shares that do not sum to 1, nor nearly so by rounding.

    Args:
        field: Name of the field.
        weights: Weight by domain.
        relative: Whether they are ratios, of any sum.
        ratios: Whether the mixer could be told so.
    """
    # fsum: the error of a plain sum over 10,000 domains exceeds the tolerance.
    total = math.fsum(weights.values())
    if total > 0 and (relative or abs(total - 1) <= ROUNDING_TOLERANCE + SUM_TOLERANCE):
        return None
    wrong = f"the shares sum to {total:.9g}, not 1"
    advice = [f"A sum within {ROUNDING_TOLERANCE:g} of 1 is allowed"]
    if total <= 0:
        advice.append("Give at least one domain a share")
    else:
        advice.append(f"Divide each by {total:.9g}")
        if ratios:
            percent = abs(total - 100) <= 100 * ROUNDING_TOLERANCE
            advice.append(f"Or set relative: true for {'percents' if percent else 'ratios'}")
    return Fault(field, dict(weights), wrong, tuple(advice))
