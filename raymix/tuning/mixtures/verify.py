"""What became of the law's optimum: predicted and measured losses side by side; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymix.laws import Objective
from raymix.tuning.compare.statistics import paired, spread
from raymix.tuning.mixtures.candidates import Mixture, Space
from raymix.tuning.mixtures.learn import LearnedLaw, predicted, value_of
from raymix.tuning.runs.results import RunResult

Roles = Mapping[str, Mixture]
"""Mixtures by what they stand for; two roles may be of one mixture."""

OPTIMUM, BEST, SECOND = "optimum", "best observed", "runner-up"
BASELINES = ("uniform", "proportional")
# Shares are rounded to six digits.
_SLACK = 1e-5


def observed(
    results: Sequence[RunResult], mixtures: Sequence[Mixture], objective: Objective
) -> list[dict[str, Any]]:
    """Return every small run with what it came to, in the order they were run."""
    by_name = {result.mixer: result for result in results}
    return [_observed(mixture, by_name.get(mixture.name), objective) for mixture in mixtures]


def _observed(mixture: Mixture, run: RunResult | None, objective: Objective) -> dict[str, Any]:
    points = [point for point in run.points if point.step > 0] if run is not None else []
    last = points[-1] if points else None
    scored = last is not None and all(name in last.losses for name in objective.weights or {})
    return {
        **mixture.document(),
        "state": "waiting" if run is None else run.state,
        "problem": None if run is None else run.problem,
        "step": last.step if last else 0,
        "seconds": run.seconds if run else 0.0,
        "value": value_of(objective, last.losses) if last is not None and scored else None,
        "losses": dict(last.losses) if last else {},
    }


def roles_of(
    runs: Sequence[Mapping[str, Any]], optimum: Mixture, references: Sequence[Mixture]
) -> dict[str, Mixture]:
    """Return the mixtures to verify, by role.

    Args:
        runs: What `observed` returned.
        optimum: The law's.
        references: Those that need no law.
    """
    done = sorted(
        (run for run in runs if run["state"] == "done" and run["value"] is not None),
        key=lambda run: run["value"],
    )
    best = {
        role: Mixture(name=run["name"], origin=run["origin"], shares=run["shares"])
        for role, run in zip((BEST, SECOND), done, strict=False)
    }
    return {OPTIMUM: optimum, **best, **{mixture.name: mixture for mixture in references}}


def verified(
    roles: Roles, results: Sequence[RunResult], learned: LearnedLaw, *, space: Space, step: float
) -> dict[str, dict[str, Any]]:
    """Return by role what was predicted of a mixture and what it came to over new seeds.

    Differences are to the references, each seed against itself, with Student's 95 % interval.
    """
    values = {role: _values(mixture, results, learned) for role, mixture in roles.items()}
    found: dict[str, dict[str, Any]] = {}
    for role, mixture in roles.items():
        told = predicted(learned, mixture.shares, step=step)
        measured = spread(values[role])
        found[role] = {
            "mixture": mixture.name,
            "shares": dict(mixture.shares),
            "allowed": _allowed(mixture, space),
            "predicted": told,
            "measured": measured,
            "losses": _losses(mixture, results),
            "error": None if measured["mean"] is None else told["value"] / measured["mean"] - 1,
            "inside": _inside(told, measured["mean"]),
            "against": {
                base: paired(values[role], values[base])
                for base in BASELINES
                if base in roles and base != role
            },
        }
    return found


def _values(
    mixture: Mixture, results: Sequence[RunResult], learned: LearnedLaw
) -> dict[int, float]:
    return {
        run.seed: value_of(learned.objective, run.losses)
        for run in results
        if run.mixer == mixture.name and run.losses
    }


def _losses(mixture: Mixture, results: Sequence[RunResult]) -> dict[str, Any]:
    runs = [run for run in results if run.mixer == mixture.name and run.losses]
    names = dict.fromkeys(name for run in runs for name in run.losses)
    return {name: spread({run.seed: run.losses[name] for run in runs}) for name in names}


def _allowed(mixture: Mixture, space: Space) -> bool:
    """Return whether a mixture is within the limits; a reference need not be."""
    share_D = space.array(mixture.shares)
    within_D = (share_D >= space.floor_D - _SLACK) & (share_D <= space.cap_D + _SLACK)
    return bool(within_D.all())


def _inside(told: Mapping[str, Any], mean: float | None) -> bool | None:
    if mean is None or told["low"] is None or not np.isfinite(mean):
        return None
    return bool(told["low"] <= mean <= told["high"])
