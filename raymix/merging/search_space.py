"""Searching a merge's numbers: which options, between what limits, and which points to try; pure.

Two names mean the same for every method: `scale`, a factor of the merged delta besides what the
file says, and `drop`, the part of the entries that is pruned (`drop`, or 1 - `density`). Any other
name is a numeric option of the method itself. Points come in rounds, each a function of the rounds
before alone, so neither the number of merges at once nor a restart changes what is tried. The first
round holds the file's own values and points spread over the whole range; each further one has a box
around the best point so far, as wide as the gaps between the points of the round before. Letters:
d options.
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
"""A value per option searched."""

SCALE, DROP = "scale", "drop"
_FLAG = "--search"
_DIGITS = 4
_SPEC = re.compile(r"([\w-]+)(?:=([^:]+):([^:]+))?")


@dataclass(frozen=True, slots=True)
class Dimension:
    """An option and the range it is looked for in."""

    name: str
    low: float
    high: float
    start: float
    """The file's own value."""
    log: bool = False
    """Whether ratios count, not differences."""
    open: bool = False
    """Whether rounds after the first may leave the range, where the best point lies at its end."""

    def at(self, unit: float) -> float:
        """Return the value at a place between 0 and 1."""
        if self.log:
            value = self.low * (self.high / self.low) ** unit
        else:
            value = self.low + (self.high - self.low) * unit
        return float(f"{value:.{_DIGITS}g}")

    def unit(self, value: float) -> float:
        """Return the place of a value; outside of 0 to 1 where it is out of range."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


# Where an option's good values are, by its name: low, high, and whether ratios count.
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
        MergeError: With one message per option that is unknown, not of the file's method, has no
            range, or is set where the search would not reach it.
    """
    specs = [part.strip() for part in text.split(",") if part.strip()]
    if not specs:
        raise MergeError.at(
            _FLAG, text, "no option is named", fix="Name some, e.g. --search scale,drop"
        )
    method = get_method(file.merge_method)
    found: dict[str, Dimension] = {}
    problems: list[str] = []
    for spec in specs:
        try:
            dimension = _dimension(file, method, spec)
            if dimension.name in found:
                raise MergeError.at(
                    _FLAG, text, f"{dimension.name} is named twice", fix="Name each option once"
                )
            found[dimension.name] = dimension
        except MergeError as error:
            problems += error.problems
    if len({_option(method, name) for name in found}) < len(found) and not problems:
        problems.append(
            format_problem(
                _FLAG,
                text,
                f"drop is 1 - density of {method.name}: one number under two names",
                fix="Name one of them",
            )
        )
    if problems:
        raise MergeError(*dict.fromkeys(problems))
    return tuple(found.values())


def _dimension(file: MergeFile, method: MergeMethod, spec: str) -> Dimension:
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
    return Dimension(name, low, high, start, log, open=name == SCALE and match[2] is None)


def searchable(method: MergeMethod) -> list[str]:
    """Return the names that `--search` takes for a method."""
    return [name for name in _RANGES if _option(method, name) is not None]


def _option(method: MergeMethod, name: str) -> str | None:
    """Return the method's own option that stands behind a name, if it has one."""
    names = method.options.names()
    if name == SCALE:
        return method.scaled_by
    if name == DROP and DROP not in names:
        return "density" if "density" in names else None
    return name if name in names and name in _RANGES else None


def _range(spec: str, name: str, low: str | None, high: str | None) -> tuple[float, float, bool]:
    least, most, log = _RANGES[name]
    if low is None or high is None:
        return least, most, log
    try:
        first, last = float(low), float(high)
    except ValueError:
        first = last = math.nan
    bounded = name not in (SCALE, "t", "epsilon")
    if not first < last or not math.isfinite(last - first) or (log and first <= 0):
        wrong, allowed = "not a range", "Write NAME=LOW:HIGH with LOW below HIGH"
        above = " and above 0" if log else ""
        raise MergeError.at(_FLAG, spec, wrong, fix=allowed + above)
    if bounded and not 0 <= first < last <= 1:
        raise MergeError.at(_FLAG, spec, "a part of a whole", allowed="Allowed: within 0:1")
    return first, last, log


def _start(file: MergeFile, method: MergeMethod, name: str, option: str) -> float:
    """Return the file's value of an option, its default where the file has none."""
    for path, scope in _scopes(file)[1:]:
        if option in scope:
            raise MergeError.at(
                f"{path}.{option}",
                scope[option],
                "set for some models or tensors alone, where a search does not reach",
                fix=f"Set parameters.{option} in its place, or do not search {name}",
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
            "not one number, which a search begins with",
            fix=f"Do not search {name}",
        )
    return 1 - float(value) if name == DROP and option != DROP else float(value)


def _scopes(file: MergeFile) -> list[tuple[str, dict[str, Any]]]:
    """Return every place that sets options: the file's own first."""
    return [
        ("parameters", file.parameters),
        *((f"rules.{at}.parameters", rule.parameters) for at, rule in enumerate(file.rules)),
        *((f"models.{at}.parameters", entry.parameters) for at, entry in enumerate(file.models)),
    ]


def applied(file: MergeFile, point: Point) -> MergeFile:
    """Return the merge file with the values of a point.

    Raises:
        MergeError: If the file's methods are not scaled by one option.
    """
    method = get_method(file.merge_method)
    parameters = dict(file.parameters)
    for name, value in point.items():
        option = _option(method, name)
        if name != SCALE and option is not None:
            parameters[option] = _clean(1 - value if option != name else value)
    changed = file.model_copy(update={"parameters": parameters})
    return _scaled(changed, point[SCALE]) if SCALE in point else changed


def _scaled(file: MergeFile, factor: float) -> MergeFile:
    others = [r.merge_method for r in file.rules if r.merge_method not in (None, KEEP_BASE)]
    knobs = {get_method(str(name)).scaled_by for name in (file.merge_method, *others)}
    if len(knobs) > 1:
        raise MergeError.at(
            _FLAG,
            SCALE,
            f"{', '.join(dict.fromkeys(map(str, others)))} is not scaled as {file.merge_method}",
            fix="Search other options of this file",
        )
    knob = str(knobs.pop())

    def times(scope: dict[str, Any]) -> dict[str, Any]:
        return {**scope, knob: _times(scope[knob], factor)} if knob in scope else scope

    own = {knob: 1.0, **file.parameters}
    return file.model_copy(
        update={
            "parameters": times(own),
            "rules": tuple(
                r.model_copy(update={"parameters": times(r.parameters)}) for r in file.rules
            ),
            "models": tuple(
                m.model_copy(update={"parameters": times(m.parameters)}) for m in file.models
            ),
        }
    )


def _times(setting: Any, factor: float) -> Any:
    """Return a setting times a factor: a number, a list over layers, or filters' values."""
    if isinstance(setting, list):
        return [_times(item, factor) for item in setting]
    if isinstance(setting, Mapping):
        return {k: _times(v, factor) if k == "value" else v for k, v in setting.items()}
    number = isinstance(setting, int | float) and not isinstance(setting, bool)
    return _clean(setting * factor) if number else setting


def _clean(value: float) -> float:
    """Return a value without what binary fractions added to it."""
    return float(f"{value:.12g}")


def start_point(space: Sequence[Dimension]) -> dict[str, float]:
    """Return the file's own values."""
    return {dimension.name: dimension.start for dimension in space}


def round_sizes(total: int) -> list[int]:
    """Return how many points each round has: half of all after the first point, then less."""
    first = total // 2
    second = (total - 1 - first + 1) // 2
    return [size for size in (1 + first, second, total - 1 - first - second) if size > 0]


def next_points(
    space: Sequence[Dimension], tried: Sequence[tuple[Point, float]], total: int
) -> list[dict[str, float]]:
    """Return the points of the next round; none when `total` points have been tried.

    Args:
        space: The options.
        tried: Points and their losses, whole rounds, in the order they were proposed; a loss that
            is not finite stands for a merge that failed.
        total: Points in all.
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
    for at in range(number):
        width *= _gap(len(space), sizes[at] - (at == 0), first=at == 0)
    best, _ = min(tried, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)
    center_D = np.array([dimension.unit(best[dimension.name]) for dimension in space])
    open_D = np.array([dimension.open for dimension in space])
    low_D = center_D - width / 2
    low_D = np.where(open_D, low_D, np.clip(low_D, 0.0, 1.0 - width))
    return _values(space, low_D + width * _spread(len(space), sizes[number], number))


def _gap(d: int, points: int, *, first: bool) -> float:
    """Return the width of the next box as a part of this one: the two gaps beside a point."""
    if d == 1:
        return min(1.0, 2 / max(1, points - 1)) if first else 1 / (1 + (points + 1) // 2)
    return min(1.0, 2 / (points ** (1 / d) + 1))


def _spread(d: int, points: int, number: int) -> NDArray[np.float64]:
    """Return points of the unit cube, shape (points, d), evenly spread; later, around 1/2."""
    if d == 1 and number == 0:
        line = np.linspace(0.0, 1.0, points) if points > 1 else np.full(points, 0.5)
        return line[:, None]
    if d == 1:
        each_side = (points + 1) // 2
        step = 0.5 / (each_side + 1)
        offsets = [side * k * step for k in range(1, each_side + 1) for side in (-1, 1)]
        return 0.5 + np.array(offsets[:points])[:, None]
    from scipy.stats import qmc

    return qmc.Halton(d, rng=number).random(points)


def _values(space: Sequence[Dimension], unit_CD: NDArray[np.float64]) -> list[dict[str, float]]:
    return [
        {dimension.name: dimension.at(float(u)) for dimension, u in zip(space, row, strict=True)}
        for row in unit_CD
    ]
