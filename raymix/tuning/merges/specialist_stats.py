"""The statistics of merged specialists: losses by seed to one JSON-able document; pure.

Losses are held-out, in nats per token, on the test rows. `recovered` is what a model has of the
specialists' gain over the base: 0 for the base, 1 for taking each domain's own specialist.
Differences are over seeds, each seed to itself, with Student's 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymix.tuning.compare.statistics import paired, spread
from raymix.tuning.runs.results import RunResult

FORMAT = 1
BASE, JOINT, SPECIALIZTS = "base", "joint", "specialists"
GIVEN, BEST = "given", "best"
Losses = Mapping[int, Mapping[str, float]]
"""By seed, by domain."""


@dataclass(frozen=True, slots=True)
class SpecialistLosses:
    """What there is to say something about."""

    domains: Sequence[str]
    seeds: Sequence[int]
    methods: Sequence[str]
    runs: Sequence[RunResult]
    """The specialists and joint training; their first points are of the base."""
    merged: Mapping[tuple[str, int], Mapping[str, Any] | None]
    """By method and seed, what its search came to."""


def specialist_stats(measured: SpecialistLosses, problems: Mapping[str, str]) -> dict[str, Any]:
    """Return rows of models, methods with their scales, differences, and what failed.

    Args:
        measured: What there is.
        problems: Of searches that failed, by name.
    """
    references = _references(measured)
    rows: dict[str, dict[str, Any]] = {
        name: _row(losses, references) for name, losses in references.items()
    }
    found: dict[str, dict[int, Mapping[str, Any]]] = {
        name: {s: told for s in measured.seeds if (told := measured.merged.get((name, s)))}
        for name in measured.methods
    }
    at = {
        which: {name: _at(runs, which) for name, runs in found.items() if runs}
        for which in (GIVEN, BEST)
    }
    return {
        "format": FORMAT,
        "rows": rows,
        "matrix": _matrix(measured),
        "merges": {
            name: {
                "scale": _scales(runs),
                GIVEN: _row(at[GIVEN][name], references),
                BEST: _row(at[BEST][name], references),
                "curves": {str(seed): _curve(told) for seed, told in runs.items()},
            }
            for name, runs in found.items()
            if runs
        },
        "differences": {which: _differences(some) for which, some in at.items()},
        "failed": sum(told is None for told in measured.merged.values()),
        "problems": dict(problems),
    }


def _references(measured: SpecialistLosses) -> dict[str, Losses]:
    """Return the losses of the base, of each domain's own specialist, and of joint training."""
    base: dict[int, dict[str, float]] = {}
    joint: dict[int, dict[str, float]] = {}
    own: dict[int, dict[str, float]] = {seed: {} for seed in measured.seeds}
    for run in measured.runs:
        if run.mixer == JOINT:
            base[run.seed] = {n: run.points[0].losses[n] for n in measured.domains}
            joint[run.seed] = {n: run.losses[n] for n in measured.domains}
        for name in measured.domains:
            if run.mixer == f"specialist-{name}":
                own[run.seed][name] = run.losses[name]
    return {BASE: base, SPECIALIZTS: own, JOINT: joint}


def _matrix(measured: SpecialistLosses) -> dict[str, dict[str, float]]:
    """Return by specialist the loss on every domain, in the mean over seeds."""
    found: dict[str, dict[str, float]] = {}
    for name in measured.domains:
        runs = [run for run in measured.runs if run.mixer == f"specialist-{name}"]
        found[name] = {
            other: math.fsum(run.losses[other] for run in runs) / len(runs)
            for other in measured.domains
        }
    return found


def _at(runs: Mapping[int, Mapping[str, Any]], which: str) -> Losses:
    return {seed: told["test"][which] for seed, told in runs.items()}


def _mean(losses: Mapping[str, float]) -> float:
    return math.fsum(losses.values()) / len(losses)


def _means(losses: Losses) -> dict[int, float]:
    return {seed: _mean(found) for seed, found in losses.items()}


def _row(losses: Losses, references: Mapping[str, Losses]) -> dict[str, Any]:
    means, base, own, joint = map(
        _means, (losses, references[BASE], references[SPECIALIZTS], references[JOINT])
    )
    domains = list(next(iter(losses.values())))
    recovered = {
        seed: (base[seed] - mean) / (base[seed] - own[seed])
        for seed, mean in means.items()
        if base[seed] != own[seed]
    }
    return {
        "mean": spread(means),
        "recovered": spread(recovered),
        "to_joint": paired(means, joint),
        "to_base": paired(means, base),
        "domains": {
            name: spread({seed: found[name] for seed, found in losses.items()}) for name in domains
        },
    }


def _scales(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    found = {seed: told["best"]["scale"] for seed, told in runs.items() if told["best"]}
    return spread(found) if found else None


def _curve(told: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Return the points of a search by scale: their losses on the rows to choose by."""
    points = [
        {"scale": point["options"].get("scale", 1.0), "loss": point["loss"]}
        for point in told["points"]
    ]
    return sorted(points, key=lambda point: point["scale"])


def _differences(found: Mapping[str, Losses]) -> dict[str, dict[str, Any]]:
    """Return the difference in the mean loss of every method to every other."""
    means = {name: _means(losses) for name, losses in found.items()}
    return {
        name: {other: paired(own, means[other]) for other in means if other != name}
        for name, own in means.items()
    }
