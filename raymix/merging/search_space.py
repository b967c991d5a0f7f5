"""Search over a merge's options: the dimensions, their ranges, and the points to try; pure.

Two names mean the same for all methods: `scale`, an additional factor of the merged delta, and
`drop`, the fraction of the entries that is pruned (`drop`, or 1 - `density`). Any other name is a
numeric option of the method itself. Points come in rounds, each a function of the earlier rounds
alone, so neither the number of concurrent merges nor a restart changes the points. The first round
has the file's own values and points spread over the full range; each further round samples a box
around the best point so far, as wide as the gaps between the points of the round before.

Axes: D searched options, C points of a round.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import MergeError, did_you_mean, format_problem
from raymix.merging.recipe import KEEP_BASE, MergeFile
from raymix.merging.registry import MergeMethod, get_method

Point = Mapping[str, float]
"""Value by searched option."""

SCALE, DROP = "scale", "drop"
_FLAG = "--search"
# Rounded, so that a point reads the same in file names, reports and recipes.
_SIGNIFICANT_DIGITS = 4
_SPEC = re.compile(r"([\w-]+)(?:=([^:]+):([^:]+))?")


@dataclass(frozen=True, slots=True)
class Dimension:
    """A searched option and its range."""

    name: str
    low: float
    high: float
    start: float
    """The merge file's own value."""
    log: bool = False
    """Whether the scale is logarithmic."""
    open: bool = False
    """Whether rounds after the first may leave the range, if the best point is at its end."""

    def value_at(self, unit: float) -> float:
        """Return the value at a unit coordinate, 0 (low) to 1 (high)."""
        if self.log:
            value = self.low * (self.high / self.low) ** unit
        else:
            value = self.low + (self.high - self.low) * unit
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")

    def unit_of(self, value: float) -> float:
        """Return the unit coordinate of a value; outside 0 to 1 if it is out of range."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


# Default range by option: low, high, and whether the scale is logarithmic.
_RANGES: dict[str, tuple[float, float, bool]] = {
    SCALE: (0.1, 4.0, True),
    DROP: (0.0, 0.95, False),
    "density": (0.05, 1.0, False),
    "drop_other": (0.0, 0.95, False),
    "gamma": (0.0, 0.2, False),
    "epsilon": (0.0, 0.3, False),
    "t": (0.0, 1.0, False),
    "common": (0.1, 1.0, False),
    "rank_tolerance": (1e-4, 0.3, True),
}


def search_space(file: MergeFile, text: str) -> tuple[Dimension, ...]:
    """Return the options named in `text`, such as `scale,drop` or `scale=0.5:2,density`.

    Raises:
        MergeError: With one message per option that is unknown, not an option of the file's
            method, without a range, or set for single models or tensors.
    """
    specs = [part.strip() for part in text.split(",") if part.strip()]
    if not specs:
        raise MergeError.at(
            _FLAG, text, "no option is named", fix="Name options, e.g. --search scale,drop"
        )
    method = get_method(file.merge_method)
    dimensions: dict[str, Dimension] = {}
    problems: list[str] = []
    for spec in specs:
        try:
            dimension = _dimension(file, method, spec)
            if dimension.name in dimensions:
                raise MergeError.at(
                    _FLAG, text, f"{dimension.name} is named twice", fix="Name each option once"
                )
            dimensions[dimension.name] = dimension
        except MergeError as error:
            problems += error.problems
    if len({_option(method, name) for name in dimensions}) < len(dimensions) and not problems:
        problems.append(
            format_problem(
                _FLAG,
                text,
                f"drop is 1 - density of {method.name}: the same number under two names",
                fix="Name one of them",
            )
        )
    if problems:
        raise MergeError(*dict.fromkeys(problems))
    return tuple(dimensions.values())


def _dimension(file: MergeFile, method: MergeMethod, spec: str) -> Dimension:
    """Return the dimension of one `NAME` or `NAME=LOW:HIGH`."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise MergeError.at(
            _FLAG,
            spec,
            "not the name of an option",
            fix="Write NAME or NAME=LOW:HIGH, e.g. scale=0.5:2",
        )
    name = match[1]
    option = _option(method, name)
    if option is None:
        known = searchable(method)
        raise MergeError.at(
            _FLAG,
            spec,
            f"{method.name} has no such option that can be searched",
            allowed=f"It has: {', '.join(known)}" if known else "It has none",
            fix=did_you_mean(name, known),
        )
    low, high, log = _range(spec, name, match[2], match[3])
    start = 1.0 if name == SCALE else _start(file, method, name, option)
    # A range that the user gave is a limit; the default range of the scale is only a guess.
    return Dimension(name, low, high, start, log, open=name == SCALE and match[2] is None)


def searchable(method: MergeMethod) -> list[str]:
    """Return the names that `--search` accepts for a method."""
    return [name for name in _RANGES if _option(method, name) is not None]


def _option(method: MergeMethod, name: str) -> str | None:
    """Return the method's option that a search name sets; None: the method has none."""
    names = method.options.names()
    if name == SCALE:
        return method.scaled_by
    if name == DROP and DROP not in names:
        return "density" if "density" in names else None
    return name if name in names and name in _RANGES else None


def _range(spec: str, name: str, low: str | None, high: str | None) -> tuple[float, float, bool]:
    """Return low, high and whether the scale is logarithmic, from the text or by default."""
    default_low, default_high, log = _RANGES[name]
    if low is None or high is None:
        return default_low, default_high, log
    try:
        first, last = float(low), float(high)
    except ValueError:
        # NaN compares false with everything, so the check below rejects it.
        first = last = math.nan
    is_fraction = name not in (SCALE, "t", "epsilon")
    if not first < last or not math.isfinite(last - first) or (log and first <= 0):
        advice = "Write NAME=LOW:HIGH with LOW below HIGH" + (" and above 0" if log else "")
        raise MergeError.at(_FLAG, spec, "not a range", fix=advice)
    if is_fraction and not 0 <= first < last <= 1:
        raise MergeError.at(_FLAG, spec, f"{name} is a fraction", allowed="Allowed: within 0:1")
    return first, last, log


def _start(file: MergeFile, method: MergeMethod, name: str, option: str) -> float:
    """Return the file's value of an option, else the option's default."""
    # A section of a rule or a model would override the searched value.
    for path, scope in _scopes(file)[1:]:
        if option in scope:
            raise MergeError.at(
                f"{path}.{option}",
                scope[option],
                "set for some models or tensors only, which a search does not change",
                fix=f"Set parameters.{option} instead, or do not search {name}",
            )
    value: Any = file.parameters.get(option)
    if value is None:
        fields = method.options.model_fields.items()
        value = next(f.default for key, f in fields if option in (key, f.alias))
        value = value[0] if isinstance(value, tuple) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MergeError.at(
            f"parameters.{option}",
            value,
            "not one number, which a search starts from",
            fix=f"Do not search {name}",
        )
    return 1 - float(value) if name == DROP and option != DROP else float(value)


def _scopes(file: MergeFile) -> list[tuple[str, dict[str, Any]]]:
    """Return path and content of all sections that set options, the file's own first."""
    return [
        ("parameters", file.parameters),
        *((f"rules.{i}.parameters", rule.parameters) for i, rule in enumerate(file.rules)),
        *((f"models.{i}.parameters", entry.parameters) for i, entry in enumerate(file.models)),
    ]


def apply_point(file: MergeFile, point: Point) -> MergeFile:
    """Return the merge file with the values of a point.

    Raises:
        MergeError: If the file's methods are not scaled by one option.
    """
    method = get_method(file.merge_method)
    parameters = dict(file.parameters)
    for name, value in point.items():
        option = _option(method, name)
        if name != SCALE and option is not None:
            parameters[option] = _round_decimal(1 - value if option != name else value)
    changed = file.model_copy(update={"parameters": parameters})
    return _with_scale(changed, point[SCALE]) if SCALE in point else changed


def _with_scale(file: MergeFile, factor: float) -> MergeFile:
    """Return the file with the scaling option multiplied by `factor` in all sections."""
    rule_methods = [r.merge_method for r in file.rules if r.merge_method not in (None, KEEP_BASE)]
    options = {get_method(str(name)).scaled_by for name in (file.merge_method, *rule_methods)}
    if len(options) > 1:
        names = ", ".join(dict.fromkeys(map(str, rule_methods)))
        raise MergeError.at(
            _FLAG,
            SCALE,
            f"{names} is not scaled as {file.merge_method}",
            fix="Search other options of this file",
        )
    option = str(options.pop())

    def scaled(scope: dict[str, Any]) -> dict[str, Any]:
        if option not in scope:
            return scope
        return {**scope, option: _scale_setting(scope[option], factor)}

    # Set at the file's level even where it is absent, so that models and rules without a value of
    # their own are scaled, too. All such options have the default 1.
    parameters = {option: 1.0, **file.parameters}
    return file.model_copy(
        update={
            "parameters": scaled(parameters),
            "rules": tuple(
                r.model_copy(update={"parameters": scaled(r.parameters)}) for r in file.rules
            ),
            "models": tuple(
                m.model_copy(update={"parameters": scaled(m.parameters)}) for m in file.models
            ),
        }
    )


def _scale_setting(setting: Any, factor: float) -> Any:
    """Return a setting times a factor: a number, a list over layers, or the values of filters."""
    if isinstance(setting, list):
        return [_scale_setting(item, factor) for item in setting]
    if isinstance(setting, Mapping):
        return {k: _scale_setting(v, factor) if k == "value" else v for k, v in setting.items()}
    is_number = isinstance(setting, int | float) and not isinstance(setting, bool)
    return _round_decimal(setting * factor) if is_number else setting


def _round_decimal(value: float) -> float:
    """Return a value without the error of binary fractions: 1 - 0.9 becomes 0.1."""
    return float(f"{value:.12g}")


def start_point(space: Sequence[Dimension]) -> dict[str, float]:
    """Return the point of the merge file's own values."""
    return {dimension.name: dimension.start for dimension in space}


def round_sizes(total: int) -> list[int]:
    """Return the points per round: the start and half of the rest, then halves of the rest."""
    first = total // 2
    second = (total - 1 - first + 1) // 2
    return [size for size in (1 + first, second, total - 1 - first - second) if size > 0]


def next_points(
    space: Sequence[Dimension], tried: Sequence[tuple[Point, float]], total: int
) -> list[dict[str, float]]:
    """Return the points of the next round; none when `total` points have been tried.

    Args:
        space: The options.
        tried: Points and their losses, complete rounds, in the order they were proposed; a loss
            that is not finite means that the merge failed.
        total: Number of points of all rounds.
    """
    sizes = round_sizes(total)
    ends = list(accumulate(sizes))
    if not tried:
        spread_CD = _spread(len(space), sizes[0] - 1, 0)
        return [start_point(space), *_values(space, spread_CD)]
    number = ends.index(len(tried)) + 1
    if number == len(sizes):
        return []
    width = 1.0
    for i in range(number):
        # The start point of round 0 is not part of the spread points.
        width *= _gap(len(space), sizes[i] - (i == 0), first=i == 0)
    best, _ = min(tried, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)
    center_D = np.array([dimension.unit_of(best[dimension.name]) for dimension in space])
    open_D = np.array([dimension.open for dimension in space])
    low_D = center_D - width / 2
    # A box at the edge is shifted inside, not cut: its points stay as dense as in the middle.
    low_D = np.where(open_D, low_D, np.clip(low_D, 0.0, 1.0 - width))
    return _values(space, low_D + width * _spread(len(space), sizes[number], number))


def _gap(d: int, points: int, *, first: bool) -> float:
    """Return the next box's width relative to this one: the gaps on both sides of a point."""
    # d = 1 has exact grids, see `_spread`: with both ends first, without them later.
    if d == 1:
        return min(1.0, 2 / max(1, points - 1)) if first else 1 / (1 + (points + 1) // 2)
    return min(1.0, 2 / (points ** (1 / d) + 1))


def _spread(d: int, points: int, number: int) -> NDArray[np.float64]:
    """Return evenly spread points of the unit cube, shape (points, d); after round 0 around 1/2."""
    if d == 1 and number == 0:
        line = np.linspace(0.0, 1.0, points) if points > 1 else np.full(points, 0.5)
        return line[:, None]
    if d == 1:
        # 1/2 itself is the best point so far, which has been tried.
        n_per_side = (points + 1) // 2
        step = 0.5 / (n_per_side + 1)
        offsets = [side * i * step for i in range(1, n_per_side + 1) for side in (-1, 1)]
        return 0.5 + np.array(offsets[:points])[:, None]
    from scipy.stats import qmc  # slow to import, and needed for two options or more only

    # Low discrepancy, so that few points cover the cube; the round is the seed of the scrambling.
    return qmc.Halton(d, rng=number).random(points)


def _values(space: Sequence[Dimension], unit_CD: NDArray[np.float64]) -> list[dict[str, float]]:
    return [
        {
            dimension.name: dimension.value_at(float(u))
            for dimension, u in zip(space, row, strict=True)
        }
        for row in unit_CD
    ]
