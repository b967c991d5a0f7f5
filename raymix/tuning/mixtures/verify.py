"""Verification of the law's optimum: predicted against measured losses; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymix.laws import Objective
from raymix.tuning.compare.statistics import paired, spread
from raymix.tuning.mixtures.candidates import Mixture, MixtureSpace
from raymix.tuning.mixtures.learn import LearnedLaw, predict_mixture, value_of
from raymix.tuning.runs.results import RunResult

Roles = Mapping[str, Mixture]
"""Mixtures by role; one mixture may have two roles."""

OPTIMUM, BEST, SECOND = "optimum", "best observed", "runner-up"
BASELINES = ("uniform", "proportional")
# Shares are rounded to six digits, and the largest one takes the rounding error of all.
_LIMIT_TOLERANCE = 1e-5


def observed_runs(
    results: Sequence[RunResult], mixtures: Sequence[Mixture], objective: Objective
) -> list[dict[str, Any]]:
    """Return one record per proxy run, in the order of the mixtures."""
    by_name = {result.mixer: result for result in results}
    return [_observed(mixture, by_name.get(mixture.name), objective) for mixture in mixtures]


def _observed(mixture: Mixture, run: RunResult | None, objective: Objective) -> dict[str, Any]:
    # A cut or failed run still has its last evaluation, which tables show.
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
        runs: Records of `observed_runs`.
        optimum: The law's optimum.
        references: Uniform and proportional.
    """
    # Runs that were cut have values at fewer steps, which do not compare.
    done = sorted(
        (run for run in runs if run["state"] == "done" and run["value"] is not None),
        key=lambda run: run["value"],
    )
    best = {
        role: Mixture(name=run["name"], origin=run["origin"], shares=run["shares"])
        # Not strict: with a single finished run there is no runner-up.
        for role, run in zip((BEST, SECOND), done, strict=False)
    }
    return {OPTIMUM: optimum, **best, **{mixture.name: mixture for mixture in references}}


def verify_mixtures(
    roles: Roles,
    results: Sequence[RunResult],
    learned: LearnedLaw,
    *,
    space: MixtureSpace,
    step: float,
) -> dict[str, dict[str, Any]]:
    """Return by role the predicted and the measured value of a mixture over new seeds.

    Differences to the references are paired by seed, with Student's 95 % interval.
    """
    values = {role: _values(mixture, results, learned) for role, mixture in roles.items()}
    table: dict[str, dict[str, Any]] = {}
    for role, mixture in roles.items():
        prediction = predict_mixture(learned, mixture.shares, step=step)
        measured = spread(values[role])
        table[role] = {
            "mixture": mixture.name,
            "shares": dict(mixture.shares),
            "allowed": _allowed(mixture, space),
            "predicted": prediction,
            "measured": measured,
            "losses": _losses(mixture, results),
            "error": None
            if measured["mean"] is None
            else prediction["value"] / measured["mean"] - 1,
            "inside": _inside(prediction, measured["mean"]),
            "against": {
                base: paired(values[role], values[base])
                for base in BASELINES
                if base in roles and base != role
            },
        }
    return table


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


def _allowed(mixture: Mixture, space: MixtureSpace) -> bool:
    """Return whether a mixture is within the limits; a reference may be outside."""
    share_D = space.array(mixture.shares)
    within_D = (share_D >= space.floor_D - _LIMIT_TOLERANCE) & (
        share_D <= space.cap_D + _LIMIT_TOLERANCE
    )
    return bool(within_D.all())


def _inside(prediction: Mapping[str, Any], mean: float | None) -> bool | None:
    """Return whether the mean lies in the predicted interval; None if either is missing."""
    if mean is None or prediction["low"] is None or not np.isfinite(mean):
        return None
    return bool(prediction["low"] <= mean <= prediction["high"])
