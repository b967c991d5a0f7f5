"""From small runs to a law and its optimum, and what the law is worth; pure.

Shapes: R rows, D domains, V targets.
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
from raymix.tuning.mixtures.candidates import Space, objective_of
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.variants import steps_of

Floats = NDArray[np.float64]

CLAIMS = {"unseen_r2": 0.97, "ahead_mre": 0.002, "paper": "BiMix, arXiv 2405.14908, abstract"}
"""Above and below which the paper says its law is: R2 on unseen mixtures, and the mean relative
error of later steps predicted from earlier ones."""

# Of a normal error: 95 % are within so many standard deviations, which are so many mean errors.
_WITHIN = 1.96
_SD_OF_MEAN_ERROR = math.sqrt(math.pi / 2)
_SLICE_POINTS = 15
_HORIZONS = 7
_FEWEST_RUNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedLaw:
    """A fitted law, and the mixture it thinks best."""

    law: Law
    report: FitReport
    objective: Objective
    optimum: Optimum


def mixture_table(
    results: Sequence[RunResult], shares: Mapping[str, Mapping[str, float]], space: Space
) -> MixtureTable:
    """Return every evaluation of the runs after their first step.

    Args:
        results: The small runs; those without an evaluation are left out.
        shares: By name of a mixture, what it reads.
        space: The domains.

    Raises:
        TrainingError: If there are fewer than three runs to learn from.
    """
    rows = [
        (run.mixer, point)
        for run in results
        for point in run.points
        if point.step > 0 and all(map(math.isfinite, point.losses.values()))
    ]
    found = {name for name, _ in rows}
    if len(found) < _FEWEST_RUNS:
        raise TrainingError.at(
            "tune",
            len(found),
            f"only {len(found)} of {len(results)} small runs came to an evaluation",
            fix=f"A law needs {_FEWEST_RUNS} or more; see the reasons above",
        )
    scored = [n for n in (*space.domains, *space.targets) if all(n in p.losses for _, p in rows)]
    columns: dict[str, Sequence[Any]] = {
        "run": [name for name, _ in rows],
        "step": [point.step for _, point in rows],
        **{f"share.{d}": [shares[name].get(d, 0.0) for name, _ in rows] for d in space.domains},
        **{f"loss.{t}": [point.losses[t] for _, point in rows] for t in scored},
    }
    return make_table(columns, name="mixtures.csv")


def learn(table: MixtureTable, recipe: Recipe, space: Space) -> LearnedLaw:
    """Return the law of the recipe fitted to the table, and its optimum.

    Raises:
        LawError: If the law cannot be fitted, or a loss that is to be minimized was not measured.
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
        most = dict(zip(law.domains, map(float, law.max_share_D), strict=True))
        caps = {name: min(cap, most[name]) for name, cap in objective.caps.items()}
        objective = replace(objective, caps=caps)
    return LearnedLaw(law=law, report=report, objective=objective, optimum=law.minimize(objective))


def check_law(kind: str) -> None:
    """Refuse a kind of law that there is not, before anything runs."""
    try:
        build_law(kind)
    except LawError as error:
        raise RecipeError(*(f"tune: {message}" for message in error.problems)) from error


def judged(learned: LearnedLaw, table: MixtureTable) -> dict[str, Any]:
    """Return how well the law predicts, beside BiMix, models that know less, and the paper.

    `unseen` are scores on runs left out, over all steps; `unseen_last` the same for the last step
    alone, where no training curve helps; `ahead` are those of later steps, from earlier ones.
    """
    reports = {learned.report.law: learned.report}
    if "bimix" in known_laws() and learned.report.law != "bimix":
        reports["bimix"] = build_law("bimix").fit(table)
    last = table.last_rows() if table.has_steps else None
    lasts = {name: build_law(name).fit(last) for name in reports} if last is not None else {}
    first = next(iter(lasts.values()), None)
    return {
        "claims": CLAIMS,
        "verdict": learned.report.verdict,
        "laws": {
            name: {
                "unseen": report.mean.document(),
                "unseen_last": lasts[name].mean.document() if name in lasts else None,
                "ahead": mean_score(report.ahead).document() if report.ahead else None,
            }
            for name, report in reports.items()
        },
        "nulls": {name: score.document() for name, score in learned.report.nulls.items()},
        "nulls_last": {} if first is None else {n: s.document() for n, s in first.nulls.items()},
    }


def value_of(objective: Objective, losses: Mapping[str, float]) -> float:
    """Return the weighted loss, or the largest weighted one, in nats per token."""
    weights = objective.weights or {}
    weighted = [weight * losses[name] for name, weight in weights.items()]
    return max(weighted) if objective.minimax else math.fsum(weighted)


def predicted(learned: LearnedLaw, shares: Mapping[str, float], *, step: float) -> dict[str, Any]:
    """Return the losses and the value predicted for a mixture, with 95 % intervals.

    An interval holds two errors, as if they were normal: the usual one of runs left out of the fit,
    and how unsure the law is at this mixture. That of the value allows for errors that all go the
    same way.
    """
    law, weights = learned.law, learned.objective.weights or {}
    share_RD, step_R = np.array([[shares.get(name, 0.0) for name in law.domains]]), np.array([step])
    loss_V = law.predict(share_RD, step_R)[0]
    deviation_V = np.nan_to_num(law.deviation(share_RD, step_R)[0])
    losses = dict(zip(law.targets, map(float, loss_V), strict=True))
    width: dict[str, float] = {}
    for name, deviation in zip(law.targets, map(float, deviation_V), strict=True):
        score = learned.report.targets.get(name)
        if score is not None and np.isfinite(score.mre):
            usual = _SD_OF_MEAN_ERROR * score.mre * losses[name]
            width[name] = _WITHIN * math.hypot(usual, deviation)
    value = value_of(learned.objective, losses)
    parts = [weight * width[name] for name, weight in weights.items() if name in width]
    half = max(parts) if parts and learned.objective.minimax else math.fsum(parts)
    known = len(parts) == len(weights)
    return {
        "value": value,
        "low": value - half if known else None,
        "high": value + half if known else None,
        "losses": losses,
    }


def path_of_optima(
    learned: LearnedLaw, recipe: Recipe, table: MixtureTable
) -> list[dict[str, Any]]:
    """Return the optimum at growing horizons, up to the recipe's own run or four small ones."""
    if table.step_R is None or not table.has_steps:
        return []
    first, last = float(np.unique(table.step_R)[0]), float(table.step_R.max())
    far = max(4 * last, float(steps_of(recipe)), learned.objective.horizon or 0.0)
    steps = sorted({*map(round, np.geomspace(max(first, last / 4), far, _HORIZONS)), round(last)})
    found: list[dict[str, Any]] = []
    for step in steps:
        optimum = learned.law.minimize(replace(learned.objective, horizon=float(step)))
        found.append(
            {
                "step": step,
                "measured": step <= last,
                "shares": dict(optimum.shares),
                "value": optimum.value,
            }
        )
    return found


def slices(learned: LearnedLaw, space: Space, *, step: float) -> dict[str, dict[str, list[float]]]:
    """Return by domain the value predicted as its share changes, the others in proportion."""
    base_D = space.array(learned.optimum.shares)
    found: dict[str, dict[str, list[float]]] = {}
    for at, name in enumerate(space.domains):
        room = float(space.floor_D.sum() - space.floor_D[at])
        high = min(float(space.cap_D[at]), 1 - room)
        # Even in log shares: most of what happens does so at small ones.
        low = max(float(space.floor_D[at]), 1e-3 * high)
        points = np.geomspace(low, high, _SLICE_POINTS)
        rows = [_with_share(base_D, space, at, float(share)) for share in points]
        found[name] = {
            "share": [float(row[at]) for row in rows],
            "value": [predicted(learned, space.shares(row), step=step)["value"] for row in rows],
        }
    return found


def _with_share(base_D: Floats, space: Space, at: int, share: float) -> Floats:
    floor_D, cap_D = space.floor_D.copy(), space.cap_D.copy()
    floor_D[at] = cap_D[at] = share
    # The other caps give way where they would leave no mixture.
    cap_D = cap_D if cap_D.sum() >= 1 else np.where(np.arange(cap_D.size) == at, share, 1.0)
    return within_limits(base_D, floor_D, cap_D)[0]
