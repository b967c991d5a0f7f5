"""Fitting a cost model to what was measured on a device, and keeping it in a file.

Four kinds of measurements, each of one thing, so that every coefficient has its own evidence:

* attention: seconds of a rank for one sequence of `tokens` on a team of `width`;
* linear: seconds of a rank for everything else, with `tokens` on it;
* gather: seconds to gather (and reduce again) `tokens` over a team of `width`;
* memory: bytes a rank uses with `tokens` on it.

All are of forward and backward, all layers. Coefficients are the non-negative least squares of
relative errors: a microsecond matters where work takes ten, not where it takes a thousand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from raymix._utils.json import parse_json
from raymix.errors import ScheduleError
from raymix.schedule.cost.model import CostModel, Link
from raymix.schedule.layout import Floats

Kind = Literal["attention", "linear", "gather", "memory"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One thing measured on one rank.

    Raises:
        ScheduleError: If the kind is unknown or a figure is no positive number.
    """

    kind: Kind
    tokens: int
    value: float
    """Seconds; bytes for memory."""
    width: int = 1
    """Ranks in the team, for attention and gather."""

    def __post_init__(self) -> None:
        """Check kind and figures."""
        if self.kind not in get_args(Kind):
            raise ScheduleError.at(
                "measurement.kind",
                self.kind,
                "not a kind",
                allowed=f"Known: {', '.join(get_args(Kind))}",
            )
        for name in ("tokens", "value", "width"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ScheduleError.at(f"measurement.{name}", value, "not a number > 0")
        if self.kind == "gather" and self.width == 1:
            raise ScheduleError.at("measurement.width", 1, "a team of one gathers nothing")


def fit_cost_model(
    measurements: Iterable[Measurement],
    *,
    hardware: str,
    date: str,
    memory_bytes: float | None = None,
    memory_tokens: int | None = None,
) -> CostModel:
    """Return the cost model that fits best, with its mean relative error per kind.

    Args:
        measurements: At least three of attention at different lengths, two of linear, and two of
            gather for every size of team that is to be used; two of memory with `memory_bytes`.
        hardware: What they were taken on.
        date: When, as YYYY-MM-DD.
        memory_bytes: What a rank may use, to be turned into tokens by the memory measurements.
        memory_tokens: Tokens a rank can hold, where that is known.

    Raises:
        ScheduleError: If there are too few measurements, or no token fits in memory.
    """
    taken = list(measurements)
    errors: dict[str, float] = {}
    quadratic, edge, piece = _attention(_of(taken, "attention", 3), errors)
    floor, base, linear = _linear(_of(taken, "linear", 2), errors)
    links = _links([item for item in taken if item.kind == "gather"], errors)
    if memory_tokens is None:
        memory_tokens = _memory(_of(taken, "memory", 2), memory_bytes, errors)
    return CostModel(
        quadratic_s=quadratic,
        edge_s=edge,
        piece_s=piece,
        linear_s=linear,
        base_s=base,
        floor_s=floor,
        links=links,
        memory_tokens=memory_tokens,
        hardware=hardware,
        date=date,
        errors=errors,
    )


def save_cost_model(cost: CostModel, path: str | os.PathLike[str]) -> None:
    """Write a cost model as JSON; a file is whole or not there."""
    from raymix.store import atomic_write_text

    atomic_write_text(os.fspath(path), json.dumps(cost.document(), indent=2) + "\n")


def load_cost_model(path: str | os.PathLike[str]) -> CostModel:
    """Return the cost model in a JSON file.

    Raises:
        ScheduleError: If there is no such file, or it holds no cost model.
    """
    try:
        document = parse_json(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ScheduleError.at("cost", os.fspath(path), "no such file") from error
    except (OSError, ValueError) as error:
        raise ScheduleError.at("cost", os.fspath(path), f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ScheduleError.at("cost", os.fspath(path), "not a cost model")
    return CostModel.from_document(document)


def _of(taken: Sequence[Measurement], kind: Kind, least: int) -> list[Measurement]:
    found = [item for item in taken if item.kind == kind]
    sizes = {item.tokens for item in found}
    if len(sizes) < least:
        raise ScheduleError.at(
            f"measurements.{kind}",
            sorted(sizes),
            f"{least} different numbers of tokens are needed",
            fix="Measure more",
        )
    return found


def _columns(items: Sequence[Measurement]) -> tuple[Floats, Floats, Floats]:
    rows = [(item.tokens, item.width, item.value) for item in items]
    tokens, width, value = np.array(rows, dtype=np.float64).T
    return tokens, width, value


def _least_squares(columns: Sequence[Floats], value: Floats) -> list[float]:
    """Return non-negative coefficients of the columns that make the relative errors least."""
    from scipy.optimize import nnls

    matrix = np.column_stack(columns) / value[:, None]
    # Columns of one size: tokens squared are a million times tokens.
    size = np.abs(matrix).max(axis=0)
    size[size == 0] = 1.0
    found, _ = nnls(matrix / size, np.ones(value.size))
    return (found / size).tolist()


def _error(fitted: Floats, value: Floats) -> float:
    return float(np.abs(fitted / value - 1).mean())


def _attention(items: list[Measurement], errors: dict[str, float]) -> list[float]:
    tokens, width, value = _columns(items)
    columns = [tokens * tokens / width, tokens, np.ones_like(tokens)]
    found = _least_squares(columns, value)
    errors["attention"] = _error(np.column_stack(columns) @ found, value)
    return found


def _linear(items: list[Measurement], errors: dict[str, float]) -> tuple[float, float, float]:
    """Return floor, base and slope: of all splits into a flat and a rising part the best."""
    tokens, _, value = _columns(sorted(items, key=lambda item: item.tokens))
    best = (np.inf, 0.0, 0.0, 0.0)
    for flat in range(tokens.size - 1):
        line = [np.ones(tokens.size - flat), tokens[flat:]]
        base, slope = _least_squares(line, value[flat:])
        floor = _least_squares([np.ones(flat)], value[:flat])[0] if flat else 0.0
        fitted = np.maximum(floor, base + slope * tokens)
        squares = float(np.square(fitted / value - 1).sum())
        # A floor that explains nothing is left out.
        if squares < best[0] * (1 - 1e-9):
            best = (squares, floor, base, slope)
            errors["linear"] = _error(fitted, value)
    return best[1:]


def _links(items: list[Measurement], errors: dict[str, float]) -> tuple[Link, ...]:
    links: list[Link] = []
    fitted: list[Floats] = []
    values: list[Floats] = []
    for width in sorted({item.width for item in items}):
        mine = _of([item for item in items if item.width == width], "gather", 2)
        tokens, _, value = _columns(mine)
        latency, slope = _least_squares([np.ones_like(tokens), tokens], value)
        links.append(Link(width, latency, slope))
        fitted.append(latency + slope * tokens)
        values.append(value)
    if links:
        errors["gather"] = _error(np.concatenate(fitted), np.concatenate(values))
    return tuple(links)


def _memory(items: list[Measurement], budget: float | None, errors: dict[str, float]) -> int:
    if budget is None:
        raise ScheduleError.at(
            "memory_bytes",
            budget,
            "with measurements of memory, the bytes that a rank may use are needed",
        )
    tokens, _, value = _columns(items)
    fixed, each = _least_squares([np.ones_like(tokens), tokens], value)
    errors["memory"] = _error(fixed + each * tokens, value)
    if not each or budget - fixed < each:
        raise ScheduleError.at(
            "memory_bytes",
            budget,
            f"not one token fits: {fixed:.4g} bytes are used before, {each:.4g} per token",
        )
    return int((budget - fixed) // each)
