"""Numbers as text, the same in the tables of pages and of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Statistic = Mapping[str, Any]
"""A quantity over seeds: `mean`, `sd`, `low`, `high`, `by_seed`, as far as it has them."""

ABSENT = "\N{EN DASH}"
"""Stands for a number that does not exist."""

_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def fixed(value: float | None, digits: int) -> str:
    """Return a number with `digits` decimals."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """Return a share as a percentage of three digits."""
    return ABSENT if share is None else f"{100 * share:.3g} %"


def amount(value: float) -> str:
    """Return a number in three digits with an SI prefix, `1.05 M`."""
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def with_spread(measured: Statistic) -> str:
    """Return the mean and the standard deviation over seeds."""
    if measured["mean"] is None:
        return ABSENT
    sd = measured["sd"]
    return f"{measured['mean']:.4f}" + ("" if sd is None else f" {_PLUS_MINUS} {sd:.4f}")


def percent_with_spread(share: Statistic) -> str:
    """Return the mean and the standard deviation over seeds of a share, as percentages."""
    if share["mean"] is None:
        return ABSENT
    sd = "" if share["sd"] is None else f" {_PLUS_MINUS} {100 * share['sd']:.1f}"
    return f"{100 * share['mean']:.1f}{sd} %"


def difference(paired: Statistic | None, digits: int = 4) -> str:
    """Return a paired difference: the mean, and its interval in brackets."""
    if paired is None:
        return ABSENT
    # A single seed has a difference but no interval.
    mean = f"{paired['mean']:+.{digits}f}"
    if paired["low"] is None:
        return mean
    return f"{mean} [{paired['low']:+.{digits}f}, {paired['high']:+.{digits}f}]"


def is_significant(paired: Statistic | None) -> bool:
    """Return whether the interval of a paired difference excludes 0."""
    if paired is None or paired["low"] is None:
        return False
    return not paired["low"] <= 0 <= paired["high"]


def prediction(predicted: Statistic) -> str:
    """Return a predicted `value` with its interval."""
    if predicted["low"] is None:
        return f"{predicted['value']:.4f}"
    return f"{predicted['value']:.4f} [{predicted['low']:.4f}, {predicted['high']:.4f}]"


def scale_range(scale: Statistic | None) -> str:
    """Return the mean scale over seeds, and its range where seeds differ."""
    if scale is None:
        return ABSENT
    # A range, as two or three seeds have no deviation worth printing of a scale.
    low, high = min(scale["by_seed"].values()), max(scale["by_seed"].values())
    between = "" if low == high else f" ({low:.2g} to {high:.2g})"
    return f"{scale['mean']:.2g}{between}"
