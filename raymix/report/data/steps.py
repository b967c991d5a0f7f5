"""Training steps of a run, read from `metrics.jsonl` in little memory.

A long run has a million lines of some kilobytes each once parsed; a report needs tens of bytes of
each, and what many lines have in common is stored once. Shapes: S recorded steps, D domains.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix._utils.json import parse_json

Floats = NDArray[np.float64]
Document = dict[str, Any]

_NUMBERS = (
    "tokens",
    "loss",
    "lr",
    "tokens_per_s",
    "data_wait",
    "mixture_version",
    "seconds",
    "grad_norm",
)


@dataclass(frozen=True, slots=True)
class DomainValues:
    """One number per domain of one step; domains that the step did not read are absent."""

    names: tuple[str, ...]
    """One object for all steps that name the same domains."""
    values: array[float]
    """In the order of `names`; NaN where the line has no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The recorded training steps, in order; NaN where a value was not recorded."""

    step_S: NDArray[np.int64]
    """Number of the step."""
    tokens_S: Floats
    """Tokens trained on up to and including the step."""
    loss_S: Floats
    """Training loss of the step, nats per token."""
    lr_S: Floats
    """Learning rate."""
    tokens_per_s_S: Floats
    """Throughput, tokens per second."""
    data_wait_S: Floats
    """Share of the step's time spent waiting for data."""
    version_S: NDArray[np.int64]
    """Version of the mixture log entry that the step followed; -1 where unknown."""
    seconds_S: Floats
    """Duration of the step, seconds."""
    grad_norm_S: Floats
    """L2 norm of the gradient before clipping."""
    counts: Sequence[DomainValues | None]
    """Tokens by domain; None where a line has none."""
    domain_loss: Sequence[DomainValues | None]
    """Training loss by domain, nats per token; None where a line has none."""
    shares: Sequence[Document | None]
    """Requested shares by domain; None where a line has none. Equal ones are one object."""

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
class _StepRecord:
    """The parts of a step's line that a report needs."""

    numbers: array[float]
    counts: DomainValues | None
    domain_loss: DomainValues | None
    shares: Document | None


def steps_and_evaluations(
    lines: Iterable[str],
) -> tuple[Steps, tuple[Evaluation, ...], list[int], bool]:
    """Return the steps and evaluations of a metrics file; the last line of a step wins.

    Returns:
        The steps and the evaluations, each in the order of steps; the numbers of damaged lines,
        from 1; and whether the last line is one of them.
    """
    steps: dict[int, _StepRecord] = {}
    evaluations: dict[int, Document] = {}
    bad: list[int] = []
    last = 0
    names: dict[tuple[str, ...], tuple[str, ...]] = {}
    shares: Document | None = None
    for number_of_line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        last = number_of_line
        try:
            line = _checked(parse_json(text))
        except (ValueError, TypeError):
            bad.append(number_of_line)
            continue
        if "eval" in line:
            evaluations[line["step"]] = line["eval"]
        if "loss" in line:
            # Shares change rarely: a million steps share a few dictionaries.
            if line.get("shares") != shares:
                shares = line["shares"] if isinstance(line.get("shares"), dict) else None
            steps[line["step"]] = _StepRecord(
                array("d", [number(line.get(key)) for key in _NUMBERS]),
                _domain_values(line.get("counts"), names, "d"),
                # Single precision has more digits than a figure shows, at half the memory.
                _domain_values(line.get("domain_loss"), names, "f"),
                shares,
            )
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


def _domain_values(
    table: Any, known: dict[tuple[str, ...], tuple[str, ...]], typecode: str
) -> DomainValues | None:
    if not isinstance(table, dict):
        return None
    names = tuple(table)
    # array("f") turns a double beyond its range into infinity without an error.
    return DomainValues(
        known.setdefault(names, names), array(typecode, map(number, table.values()))
    )


def _steps(records: dict[int, _StepRecord]) -> Steps:
    step_S = np.array(sorted(records), dtype=np.int64)
    rows = [records[step] for step in step_S.tolist()]
    numbers = np.array([row.numbers for row in rows], dtype=np.float64)
    columns = numbers.reshape(-1, len(_NUMBERS)).T.copy()
    tokens_S, loss_S, lr_S, tokens_per_s_S, data_wait_S, version_S, seconds_S, norm_S = columns
    # Doubles hold integers exactly below 2**53 only.
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
        grad_norm_S=norm_S,
        counts=[row.counts for row in rows],
        domain_loss=[row.domain_loss for row in rows],
        shares=[row.shares for row in rows],
    )


def is_step(value: Any) -> bool:
    """Return whether `value` can be the number of a step."""
    return type(value) is int and 0 <= value < 2**53


def number(value: Any) -> float:
    """Return `value` as a float, NaN where it is none."""
    # JSON integers have no bound, and float() of one beyond 2**1024 raises OverflowError.
    valid = isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)
    return float(value) if valid else float("nan")
