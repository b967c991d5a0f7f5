"""Fit of a cost model to measurements on a device; cost model files.

Four kinds of measurements, each of which determines its own coefficients:

* attention: seconds of a rank for one sequence of `tokens` on a CP group of `width`;
* linear: seconds of a rank for everything else, with `tokens` on it;
* gather: seconds to all-gather and reduce-scatter `tokens` over a CP group of `width`;
* memory: bytes used on a rank with `tokens` on it.

All are of forward and backward, all layers. The fit is non-negative least squares of the relative
errors: measurements span four orders of magnitude, and absolute errors would fit the longest alone.
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
    """One measurement on one rank.

    Raises:
        ScheduleError: If the kind is unknown or a number is not positive.
    """

    kind: Kind
    tokens: int
    value: float
    """Seconds; bytes for memory."""
    width: int = 1
    """Ranks in the CP group, for attention and gather."""

    def __post_init__(self) -> None:
        """Check the kind and the numbers."""
        if self.kind not in get_args(Kind):
            raise ScheduleError.at(
                "measurement.kind",
                self.kind,
                "not a kind",
                allowed=f"Known: {', '.join(get_args(Kind))}",
            )
        for name in ("tokens", "value", "width"):
            value = getattr(self, name)
            # The fit divides by values to make errors relative.
            if not (np.isfinite(value) and value > 0):
                raise ScheduleError.at(f"measurement.{name}", value, "not a number > 0")
        if self.kind == "gather" and self.width == 1:
            raise ScheduleError.at("measurement.width", 1, "a group of one rank gathers nothing")


def fit_cost_model(
    measurements: Iterable[Measurement],
    *,
    hardware: str,
    date: str,
    memory_bytes: float | None = None,
    memory_tokens: int | None = None,
) -> CostModel:
    """Return the least-squares cost model, with its mean relative error per kind.

    Args:
        measurements: Attention at three lengths or more, linear at two, gather at two for every
            width in use; memory at two, with `memory_bytes`.
        hardware: The device they were taken on.
        date: Their date, YYYY-MM-DD.
        memory_bytes: Bytes a rank may use, converted to tokens by the memory measurements.
        memory_tokens: Tokens a rank can hold, if known; replaces the memory measurements.

    Raises:
        ScheduleError: If there are too few measurements, or no token fits in memory.
    """
    samples = list(measurements)
    errors: dict[str, float] = {}
    quadratic, edge, piece = _fit_attention(_of_kind(samples, "attention", 3), errors)
    floor, base, linear = _fit_linear(_of_kind(samples, "linear", 2), errors)
    links = _fit_links([sample for sample in samples if sample.kind == "gather"], errors)
    if memory_tokens is None:
        memory_tokens = _fit_memory(_of_kind(samples, "memory", 2), memory_bytes, errors)
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
    """Write a cost model as JSON, atomically."""
    # Here, as the store imports pyarrow, which planning alone does not need.
    from raymix.store import atomic_write_text

    atomic_write_text(os.fspath(path), json.dumps(cost.document(), indent=2) + "\n")


def load_cost_model(path: str | os.PathLike[str]) -> CostModel:
    """Return the cost model in a JSON file.

    Raises:
        ScheduleError: If the file does not exist or is not a cost model.
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


def _of_kind(samples: Sequence[Measurement], kind: Kind, min_sizes: int) -> list[Measurement]:
    """Return the measurements of a kind, at `min_sizes` numbers of tokens or more."""
    selected = [sample for sample in samples if sample.kind == kind]
    # Distinct: repeats at one size leave the columns of the fit dependent.
    sizes = {sample.tokens for sample in selected}
    if len(sizes) < min_sizes:
        raise ScheduleError.at(
            f"measurements.{kind}",
            sorted(sizes),
            f"{min_sizes} different numbers of tokens are needed",
            fix="Measure more",
        )
    return selected


def _columns(samples: Sequence[Measurement]) -> tuple[Floats, Floats, Floats]:
    """Return tokens, width and value of the measurements."""
    rows = [(sample.tokens, sample.width, sample.value) for sample in samples]
    tokens, width, value = np.array(rows, dtype=np.float64).T
    return tokens, width, value


def _least_squares(columns: Sequence[Floats], value: Floats) -> list[float]:
    """Return the non-negative coefficients of the columns that minimize squared relative errors."""
    # Here, as importing scipy.optimize takes longer than planning a batch.
    from scipy.optimize import nnls

    matrix = np.column_stack(columns) / value[:, None]
    # Scale columns to one size: tokens squared exceed tokens by orders of magnitude, and nnls
    # compares all columns with one tolerance.
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    coefficients, _ = nnls(matrix / scale, np.ones(value.size))
    return (coefficients / scale).tolist()


def _mean_error(fitted: Floats, value: Floats) -> float:
    """Return the mean relative error."""
    return float(np.abs(fitted / value - 1).mean())


def _fit_attention(samples: list[Measurement], errors: dict[str, float]) -> list[float]:
    """Return the three coefficients of eq. (2) of `model`."""
    tokens, width, value = _columns(samples)
    columns = [tokens * tokens / width, tokens, np.ones_like(tokens)]
    coefficients = _least_squares(columns, value)
    errors["attention"] = _mean_error(np.column_stack(columns) @ coefficients, value)
    return coefficients


def _fit_linear(samples: list[Measurement], errors: dict[str, float]) -> tuple[float, float, float]:
    """Return floor, base and slope of the best split into a flat and a rising part."""
    tokens, _, value = _columns(sorted(samples, key=lambda sample: sample.tokens))
    best = (np.inf, 0.0, 0.0, 0.0)
    # The maximum of floor and line is not linear in its coefficients; given the measurement where
    # the line begins, both parts are, and there are few such measurements to try.
    for n_flat in range(tokens.size - 1):
        line = [np.ones(tokens.size - n_flat), tokens[n_flat:]]
        base, slope = _least_squares(line, value[n_flat:])
        floor = _least_squares([np.ones(n_flat)], value[:n_flat])[0] if n_flat else 0.0
        fitted = np.maximum(floor, base + slope * tokens)
        squared_error = float(np.square(fitted / value - 1).sum())
        # A gain within rounding does not justify a floor; the first split has none.
        if squared_error < best[0] * (1 - 1e-9):
            best = (squared_error, floor, base, slope)
            errors["linear"] = _mean_error(fitted, value)
    return best[1:]


def _fit_links(samples: list[Measurement], errors: dict[str, float]) -> tuple[Link, ...]:
    """Return latency and seconds per token for each width that was measured."""
    links: list[Link] = []
    fitted: list[Floats] = []
    values: list[Floats] = []
    for width in sorted({sample.width for sample in samples}):
        of_width = [sample for sample in samples if sample.width == width]
        tokens, _, value = _columns(_of_kind(of_width, "gather", 2))
        latency, slope = _least_squares([np.ones_like(tokens), tokens], value)
        links.append(Link(width, latency, slope))
        fitted.append(latency + slope * tokens)
        values.append(value)
    if links:
        errors["gather"] = _mean_error(np.concatenate(fitted), np.concatenate(values))
    return tuple(links)


def _fit_memory(
    samples: list[Measurement], memory_bytes: float | None, errors: dict[str, float]
) -> int:
    """Return the tokens that fit in `memory_bytes`, by a line through the measurements."""
    if memory_bytes is None:
        raise ScheduleError.at(
            "memory_bytes",
            memory_bytes,
            "with measurements of memory, the bytes that a rank may use are needed",
        )
    tokens, _, value = _columns(samples)
    fixed_bytes, token_bytes = _least_squares([np.ones_like(tokens), tokens], value)
    errors["memory"] = _mean_error(fixed_bytes + token_bytes * tokens, value)
    # A slope of zero, where memory did not grow with tokens, would allow infinitely many.
    if not token_bytes or memory_bytes - fixed_bytes < token_bytes:
        raise ScheduleError.at(
            "memory_bytes",
            memory_bytes,
            f"not one token fits: {fixed_bytes:.4g} bytes are used at zero tokens, "
            f"{token_bytes:.4g} per token",
        )
    return int((memory_bytes - fixed_bytes) // token_bytes)
