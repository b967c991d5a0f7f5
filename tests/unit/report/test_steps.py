"""Steps out of a metrics file: what is kept, of which line, and in how much memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np

from raymix.report.data.steps import steps_and_evaluations


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens": 64 * step, "seconds": 0.25, **more}


def test_the_last_line_of_a_step_counts() -> None:
    entries = [
        line(1, counts={"a": 48, "b": 16}, shares={"a": 0.75, "b": 0.25}, grad_norm=0.5),
        line(2, counts={"b": 64}),
        {"step": 2, "eval": {"a": {"loss": 3.0}}},
        line(2, loss=2.0, counts={"a": 64}, domain_loss={"a": 1.5}),
    ]
    texts = [json.dumps(item) + "\n" for item in entries]
    steps, evaluations, bad, cut_off = steps_and_evaluations([*texts, "\n", '{"step": 3, "lo'])
    assert steps.step_S.tolist() == [1, 2]
    assert steps.loss_S.tolist() == [2.5, 2.0]
    assert steps.version_S.tolist() == [-1, -1]
    assert np.isnan(steps.lr_S).all()
    assert [(c.names, c.values.tolist()) for c in steps.counts if c] == [
        (("a", "b"), [48.0, 16.0]),
        (("a",), [64.0]),
    ]
    assert steps.grad_norm_S[0] == 0.5
    assert np.isnan(steps.grad_norm_S[1])
    assert [losses and losses.values.tolist() for losses in steps.domain_loss] == [None, [1.5]]
    assert steps.shares == [{"a": 0.75, "b": 0.25}, None]
    assert [(evaluation.step, evaluation.domains) for evaluation in evaluations] == [
        (2, {"a": {"loss": 3.0}})
    ]
    assert (bad, cut_off) == ([6], True)


def test_long_runs_of_many_domains_fit_in_memory() -> None:
    names = [f"domain {n}" for n in range(200)]
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for step in range(500):
            fields = {
                "counts": dict.fromkeys(names, 1000 + step),
                "shares": dict.fromkeys(names, 1 / 200),
                "domain_loss": dict.fromkeys(names, step + 0.5),
            }
            text = json.dumps(line(step, **fields)) + "\n"
            size += len(text)
            yield text

    tracemalloc.start()
    try:
        steps, *_ = steps_and_evaluations(lines())
        traced_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(steps) == 500
    # The parsed lines would take four times their text, not a quarter.
    assert traced_bytes < size / 4
