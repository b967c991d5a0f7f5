"""Arrays from numbers that a recipe gives by domain name: weights, losses.

Axes: D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raymix.errors import RecipeError, did_you_mean, format_problem
from raymix.mixers.base import MixerContext, Shares
from raymix.recipe.shares import ROUNDING_TOLERANCE, SUM_TOLERANCE

# A suggestion costs an edit distance to every domain, and there may be 10,000 of them.
_MAX_SHOWN = 5


def shares_by_name(
    weights: Mapping[str, float], context: MixerContext, *, path: str, relative: bool = False
) -> Shares:
    """Return weights by name as shares that sum to 1, shape (D,); a domain left out gets 0.

    Args:
        weights: Share by domain, or ratios of any sum where `relative`.
        context: Names the domains and the targets.
        path: Dotted path of the field, for messages.
        relative: Whether any sum is allowed.

    Raises:
        RecipeError: If a name is no domain's or a target's, a weight is not a number >= 0, or the
            sum is further than 1 % from 1.
    """
    problems = [*_unknown(weights, context, path), *_negative(weights, path)]
    problems += [
        format_problem(
            f"{path}.{name}",
            weights[name],
            "a target is measured and never trained on",
            fix="Its share must be 0",
        )
        for name in context.targets
        if weights.get(name, 0) > 0
    ]
    if problems:
        raise RecipeError(*problems)
    # fsum: 10,000 shares added in order would miss the tolerance by rounding alone.
    total = math.fsum(weights.values())
    if total <= 0 or (not relative and abs(total - 1) > ROUNDING_TOLERANCE + SUM_TOLERANCE):
        left_out = [name for name in context.domains if name not in weights]
        raise RecipeError.at(
            path,
            dict(list(weights.items())[: 4 * _MAX_SHOWN]),
            f"the weights sum to {total:.6g}, not to 1",
            allowed=f"Left out, so 0: {some(left_out)}" if left_out else "",
            fix=f"Divide each by {total:.6g}" if total > 0 else "Give a domain a weight",
        )
    # All the way to 1: the sampler wants shares that sum to 1 as floats do.
    return np.array([weights.get(name, 0.0) for name in context.domains]) / total


def values_by_name(
    values: Mapping[str, float], context: MixerContext, *, path: str
) -> NDArray[np.float64]:
    """Return numbers by name, shape (D,), NaN for a target that is left out.

    Raises:
        RecipeError: If a name is no domain's, a value is not a number >= 0, or a domain that is
            trained on is left out.
    """
    problems = [*_unknown(values, context, path), *_negative(values, path)]
    targets = set(context.targets)
    absent = [name for name in context.domains if name not in values and name not in targets]
    if absent:
        advice = f"Give every domain one; missing: {some(absent)}"
        shown = dict(list(values.items())[:_MAX_SHOWN])
        problems.append(
            format_problem(path, shown, f"{len(absent)} domains have no value", fix=advice)
        )
    if problems:
        raise RecipeError(*problems)
    return np.array([values.get(name, math.nan) for name in context.domains])


def some(names: Sequence[str], limit: int = 8) -> str:
    """Return the names for a message, the first few when there are many."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def _unknown(values: Mapping[str, float], context: MixerContext, path: str) -> Iterable[str]:
    known = set(context.domains)
    unknown = [name for name in values if name not in known]
    for name in unknown[:_MAX_SHOWN]:
        near = did_you_mean(name, context.domains)
        wrong, advice = "the corpus has no such domain", f"It has {some(context.domains)}"
        yield format_problem(f"{path}.{name}", values[name], wrong, allowed=advice, fix=near)
    if len(unknown) > _MAX_SHOWN:
        more = unknown[_MAX_SHOWN:]
        yield format_problem(path, some(more, 3), f"{len(more)} more names are of no domain")


def _negative(values: Mapping[str, float], path: str) -> Iterable[str]:
    # Written as a range so that NaN fails it, too.
    wrong = [name for name, value in values.items() if not 0 <= value < math.inf]
    for name in wrong[:_MAX_SHOWN]:
        yield format_problem(f"{path}.{name}", values[name], "not a number >= 0")
    if len(wrong) > _MAX_SHOWN:
        yield format_problem(path, some(wrong[_MAX_SHOWN:], 3), "these are not numbers >= 0 either")
