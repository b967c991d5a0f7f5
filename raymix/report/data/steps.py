"""The steps of a run out of `metrics.jsonl`, of which a long run has a million, in little memory.

A line is some kilobytes once it is parsed; what a report needs of it is kept in tens of bytes, and
what is the same in many lines, once. Shapes: S recorded steps, D domains.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.jsontext import parse_json

Floats = NDArray[np.float64]
Document = dict[str, Any]

_NUMBERS = ("tokens", "loss", "lr", "tokens_per_s", "data_wait", "mixture_version", "seconds")


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of one step by domain."""

    names: tuple[str, ...]
    """One object for all steps that have the same."""
    tokens: array[float]
    """NaN where the line holds no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The recorded training steps, in order; NaN where a value was not recorded."""

    step_S: NDArray[np.int64]
    """Number of the step."""
    tokens_S: Floats
    """Tokens trained on up to and with the step."""
    loss_S: Floats
    """Training loss, nats per token."""
    lr_S: Floats
    """Learning rate."""
    tokens_per_s_S: Floats
    """Throughput."""
    data_wait_S: Floats
    """Share of the step's time spent waiting for data."""
    version_S: NDArray[np.int64]
    """Version of the mixture log entry that the step followed; -1 where unknown."""
    seconds_S: Floats
    """Seconds that the step took."""
    counts: Sequence[Counts | None]
    """Tokens by domain; None where a line does not say."""
    shares: Sequence[Document | None]
    """Shares asked by domain; None where a line does not say. Equal ones are one object."""

    def __len__(self) -> int:
        return self.step_S.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out scores after some step."""

    step: int
    """Steps trained before it; 0 is the untrained model."""
    domains: Document
    """Per domain: `loss` (nats per token), `bits_per_byte`, `tokens`."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of a step's line."""

    numbers: array[float]
    counts: Counts | None
    shares: Document | None


def steps_and_evaluations(
    lines: Iterable[str],
) -> tuple[Steps, tuple[Evaluation, ...], list[int], bool]:
    """Return what the lines of a metrics file say; of several for a step, the last.

    Returns:
        The steps and the evaluations, each in the order of steps; the numbers of damaged lines,
        from 1; and whether the last line is one of them.
    """
    steps: dict[int, _Kept] = {}
    evaluations: dict[int, Document] = {}
    bad: list[int] = []
    last = 0
    names: dict[tuple[str, ...], tuple[str, ...]] = {}
    shares: Document | None = None
    for at, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        last = at
        try:
            line = _checked(parse_json(text))
        except (ValueError, TypeError):
            bad.append(at)
            continue
        if "eval" in line:
            evaluations[line["step"]] = line["eval"]
        if "loss" in line:
            told = line.get("shares")
            if told != shares:
                shares = told if isinstance(told, dict) else None
            numbers = array("d", [number(line.get(key)) for key in _NUMBERS])
            steps[line["step"]] = _Kept(numbers, _counts(line.get("counts"), names), shares)
    scores = (Evaluation(step=at, domains=evaluations[at]) for at in sorted(evaluations))
    return _steps(steps), tuple(scores), bad, bool(bad) and bad[-1] == last


def _checked(line: Any) -> Document:
    if not isinstance(line, dict) or not is_step(line.get("step")):
        raise TypeError("not an object with a step")
    if not isinstance(line.get("eval", {}), dict):
        raise TypeError("eval is not an object")
    if not isinstance(line.get("loss", 0.0), int | float | None):
        raise TypeError("loss is not a number")
    return line


def _counts(told: Any, known: dict[tuple[str, ...], tuple[str, ...]]) -> Counts | None:
    if not isinstance(told, dict):
        return None
    names = tuple(told)
    return Counts(known.setdefault(names, names), array("d", map(number, told.values())))


def _steps(kept: dict[int, _Kept]) -> Steps:
    step_S = np.array(sorted(kept), dtype=np.int64)
    rows = [kept[step] for step in step_S.tolist()]
    told = np.array([row.numbers for row in rows], dtype=np.float64).reshape(-1, len(_NUMBERS)).T
    tokens_S, loss_S, lr_S, tokens_per_s_S, data_wait_S, version_S, seconds_S = told.copy()
    known_S = (version_S >= 0) & (version_S < 2**53)
    return Steps(
        step_S=step_S,
        tokens_S=tokens_S,
        loss_S=loss_S,
        lr_S=lr_S,
        tokens_per_s_S=tokens_per_s_S,
        data_wait_S=data_wait_S,
        version_S=np.where(known_S, version_S, -1.0).astype(np.int64),
        seconds_S=seconds_S,
        counts=[row.counts for row in rows],
        shares=[row.shares for row in rows],
    )


def is_step(value: Any) -> bool:
    """Return whether `value` can be the number of a step."""
    return type(value) is int and 0 <= value < 2**53


def number(value: Any) -> float:
    """Return `value` as a float, NaN where it is none."""
    good = isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)
    return float(value) if good else float("nan")
