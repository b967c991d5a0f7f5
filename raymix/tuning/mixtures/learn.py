"""Mixing law of the proxy runs: table, fit, optimum, accuracy, predictions; pure functions.

Axes: R rows of the table, D domains, V targets (losses).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import LawError, RecipeError, TrainingError
from raymix.laws import (
    FitReport,
    Law,
    MixtureTable,
    Objective,
    Optimum,
    build_law,
    known_laws,
    make_table,
    mean_score,
)
from raymix.laws.design import within_limits
from raymix.recipe import Recipe
from raymix.tuning.mixtures.candidates import MixtureSpace, objective_of
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.variants import steps_of

Floats = NDArray[np.float64]

CLAIMS = {"unseen_r2": 0.97, "ahead_mre": 0.002, "paper": "BiMix, arXiv 2405.14908, abstract"}
"""Published accuracy of BiMix: lower bound of R2 on unseen mixtures, upper bound of the mean
relative error of later steps predicted from earlier ones."""

# Of normal errors 95 % lie within 1.96 sd, and sd = sqrt(pi/2) x mean absolute error.
_Z_95 = 1.96
_SD_OF_MEAN_ERROR = math.sqrt(math.pi / 2)
_SLICE_POINTS = 15
_HORIZONS = 7
# Lowest share of a slice, relative to its highest: a logarithmic axis has no zero.
_MIN_SLICE = 1e-3
_MIN_RUNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedLaw:
    """A fitted law, its objective, and the optimum under it."""

    law: Law
    report: FitReport
    objective: Objective
    optimum: Optimum


def mixture_table(
    results: Sequence[RunResult], shares: Mapping[str, Mapping[str, float]], space: MixtureSpace
) -> MixtureTable:
    """Return the mixture table: one row per evaluation after step 0.

    Args:
        results: The proxy runs; those without an evaluation are left out.
        shares: Shares by domain, by name of the mixture.
        space: The domains.

    Raises:
        TrainingError: If fewer than three runs have an evaluation.
    """
    # Step 0 is the same model under every mixture, and no law can be fitted to a loss of NaN.
    rows = [
        (run.mixer, point)
        for run in results
        for point in run.points
        if point.step > 0 and all(map(math.isfinite, point.losses.values()))
    ]
    run_names = {name for name, _ in rows}
    if len(run_names) < _MIN_RUNS:
        raise TrainingError.at(
            "tune",
            len(run_names),
            f"only {len(run_names)} of {len(results)} small runs came to an evaluation",
            fix=f"A law needs {_MIN_RUNS} or more; see the reasons above",
        )
    # A law needs complete columns, so a loss that some run lacks is dropped.
    scored = [n for n in (*space.domains, *space.targets) if all(n in p.losses for _, p in rows)]
    columns: dict[str, Sequence[Any]] = {
        "run": [name for name, _ in rows],
        "step": [point.step for _, point in rows],
        **{f"share.{d}": [shares[name].get(d, 0.0) for name, _ in rows] for d in space.domains},
        **{f"loss.{t}": [point.losses[t] for _, point in rows] for t in scored},
    }
    return make_table(columns, name="mixtures.csv")


def learn(table: MixtureTable, recipe: Recipe, space: MixtureSpace) -> LearnedLaw:
    """Fit the law of the recipe to the table and minimize it.

    Raises:
        LawError: If the law cannot be fitted, or a loss of the objective was not measured.
    """
    law = build_law(recipe.tune.law)
    report = law.fit(table)
    steps = float(table.step_R.max()) if table.step_R is not None else 1.0
    objective = objective_of(recipe, space, horizon=float(recipe.tune.horizon or steps))
    for name in objective.weights or {}:
        if name not in law.targets:
            raise LawError.at(
                "tune.weights",
                name,
                "no loss of this name was measured in every small run",
                fix=f"Measured: {', '.join(law.targets)}",
            )
    if not recipe.tune.extrapolate:
        # Laws err most beyond the data: no share above the largest one that a run had.
        largest = dict(zip(law.domains, map(float, law.max_share_D), strict=True))
        caps = {name: min(cap, largest[name]) for name, cap in objective.caps.items()}
        objective = replace(objective, caps=caps)
    return LearnedLaw(law=law, report=report, objective=objective, optimum=law.minimize(objective))


def check_law(kind: str) -> None:
    """Raise RecipeError for an unknown kind of law, before any run starts."""
    try:
        build_law(kind)
    except LawError as error:
        raise RecipeError(*(f"tune: {message}" for message in error.problems)) from error


def law_accuracy(learned: LearnedLaw, table: MixtureTable) -> dict[str, Any]:
    """Return the accuracy of the law beside BiMix, null models and the published figures.

    `unseen` are scores on held-out runs over all steps; `unseen_last` the same on the last step
    alone; `ahead` are scores on later steps of a fit to earlier ones.
    """
    reports = {learned.report.law: learned.report}
    if "bimix" in known_laws() and learned.report.law != "bimix":
        reports["bimix"] = build_law("bimix").fit(table)
    # Over all steps, knowing the training curve alone gives a high R2. At the last step only the
    # mixture explains differences, so laws are compared there as well.
    last = table.last_rows() if table.has_steps else None
    last_reports = {name: build_law(name).fit(last) for name in reports} if last is not None else {}
    # Null models do not depend on the law: those of any report will do.
    first = next(iter(last_reports.values()), None)
    return {
        "claims": CLAIMS,
        "verdict": learned.report.verdict,
        "laws": {
            name: {
                "unseen": report.mean.document(),
                "unseen_last": last_reports[name].mean.document() if name in last_reports else None,
                "ahead": mean_score(report.ahead).document() if report.ahead else None,
            }
            for name, report in reports.items()
        },
        "nulls": {name: score.document() for name, score in learned.report.nulls.items()},
        "nulls_last": {} if first is None else {n: s.document() for n, s in first.nulls.items()},
    }


def value_of(objective: Objective, losses: Mapping[str, float]) -> float:
    """Return the objective, in nats per token: weighted sum or weighted maximum of losses."""
    weights = objective.weights or {}
    weighted = [weight * losses[name] for name, weight in weights.items()]
    return max(weighted) if objective.minimax else math.fsum(weighted)


def predict_mixture(
    learned: LearnedLaw, shares: Mapping[str, float], *, step: float
) -> dict[str, Any]:
    """Return the losses and the value predicted for a mixture, with 95 % intervals.

    An interval combines two errors, assumed normal and independent: the cross-validation error of
    the fit, and the law's own standard deviation at this mixture. The interval of the value assumes
    fully correlated errors of the losses.
    """
    law, weights = learned.law, learned.objective.weights or {}
    share_RD, step_R = np.array([[shares.get(name, 0.0) for name in law.domains]]), np.array([step])
    loss_V = law.predict(share_RD, step_R)[0]
    # NaN where the law has no uncertainty of its own; the cross-validation error is then all.
    deviation_V = np.nan_to_num(law.deviation(share_RD, step_R)[0])
    losses = dict(zip(law.targets, map(float, loss_V), strict=True))
    half_widths: dict[str, float] = {}
    for name, deviation in zip(law.targets, map(float, deviation_V), strict=True):
        score = learned.report.targets.get(name)
        if score is not None and np.isfinite(score.mre):
            # `mre` is a mean absolute error relative to the loss.
            residual = _SD_OF_MEAN_ERROR * score.mre * losses[name]
            half_widths[name] = _Z_95 * math.hypot(residual, deviation)
    value = value_of(learned.objective, losses)
    parts = [weight * half_widths[name] for name, weight in weights.items() if name in half_widths]
    # Correlated errors add up linearly. One mixture's losses do move together.
    half = max(parts) if parts and learned.objective.minimax else math.fsum(parts)
    complete = len(parts) == len(weights)
    return {
        "value": value,
        "low": value - half if complete else None,
        "high": value + half if complete else None,
        "losses": losses,
    }


def optimum_path(learned: LearnedLaw, recipe: Recipe, table: MixtureTable) -> list[dict[str, Any]]:
    """Return the optimum at growing horizons, up to the recipe's own run or four proxy runs."""
    if table.step_R is None or not table.has_steps:
        return []
    first, last = float(np.unique(table.step_R)[0]), float(table.step_R.max())
    max_horizon = max(4 * last, float(steps_of(recipe)), learned.objective.horizon or 0.0)
    # Even in log steps: laws are power laws of the steps.
    steps = sorted(
        {*map(round, np.geomspace(max(first, last / 4), max_horizon, _HORIZONS)), round(last)}
    )
    optima: list[dict[str, Any]] = []
    for step in steps:
        optimum = learned.law.minimize(replace(learned.objective, horizon=float(step)))
        optima.append(
            {
                "step": step,
                "measured": step <= last,
                "shares": dict(optimum.shares),
                "value": optimum.value,
            }
        )
    return optima


def slices(
    learned: LearnedLaw, space: MixtureSpace, *, step: float
) -> dict[str, dict[str, list[float]]]:
    """Return by domain the predicted value over its share, the other shares in proportion."""
    base_D = space.array(learned.optimum.shares)
    curves: dict[str, dict[str, list[float]]] = {}
    for index, name in enumerate(space.domains):
        other_floors = float(space.floor_D.sum() - space.floor_D[index])
        high = min(float(space.cap_D[index]), 1 - other_floors)
        # Even in log shares: losses change most at small shares.
        low = max(float(space.floor_D[index]), _MIN_SLICE * high)
        points = np.geomspace(low, high, _SLICE_POINTS)
        rows = [_with_share(base_D, space, index, float(share)) for share in points]
        curves[name] = {
            "share": [float(row[index]) for row in rows],
            "value": [
                predict_mixture(learned, space.shares(row), step=step)["value"] for row in rows
            ],
        }
    return curves


def _with_share(base_D: Floats, space: MixtureSpace, index: int, share: float) -> Floats:
    """Return the nearest mixture to `base_D`, shape (D,), with one share fixed."""
    floor_D, cap_D = space.floor_D.copy(), space.cap_D.copy()
    floor_D[index] = cap_D[index] = share
    # The fixed share comes first: where the other caps leave no mixture, they are dropped.
    cap_D = cap_D if cap_D.sum() >= 1 else np.where(np.arange(cap_D.size) == index, share, 1.0)
    return within_limits(base_D, floor_D, cap_D)[0]
