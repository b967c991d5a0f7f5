"""Statistics of merged specialists: losses by seed to one JSON-able document; pure functions.

Losses are held-out, in nats per token, on the test rows. `recovered` is the fraction of the
specialists' gain over the base that a model has: 0 for the base, 1 for each domain's own
specialist. Differences are paired by seed, with Student's 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymix.tuning.compare.statistics import paired, spread
from raymix.tuning.runs.results import RunResult

FORMAT = 1
BASE, JOINT, SPECIALISTS = "base", "joint", "specialists"
GIVEN, BEST = "given", "best"
Losses = Mapping[int, Mapping[str, float]]
"""Losses by seed, by domain."""


@dataclass(frozen=True, slots=True)
class SpecialistLosses:
    """Measured losses of the runs and of the merge searches."""

    domains: Sequence[str]
    seeds: Sequence[int]
    methods: Sequence[str]
    runs: Sequence[RunResult]
    """The specialists and joint training; their first evaluation is that of the base."""
    merged: Mapping[tuple[str, int], Mapping[str, Any] | None]
    """Result of each search, by method and seed; None if it failed."""


def specialist_stats(measured: SpecialistLosses, problems: Mapping[str, str]) -> dict[str, Any]:
    """Return rows per model, methods with their scales, differences and failures.

    Args:
        measured: The measured losses.
        problems: Reasons of failed searches, by name.
    """
    references = _references(measured)
    rows: dict[str, dict[str, Any]] = {
        name: _row(losses, references) for name, losses in references.items()
    }
    results: dict[str, dict[int, Mapping[str, Any]]] = {
        name: {s: result for s in measured.seeds if (result := measured.merged.get((name, s)))}
        for name in measured.methods
    }
    # A method whose searches all failed has no row.
    losses_at = {
        scale: {name: _test_losses(runs, scale) for name, runs in results.items() if runs}
        for scale in (GIVEN, BEST)
    }
    return {
        "format": FORMAT,
        "rows": rows,
        "matrix": _matrix(measured),
        "merges": {
            name: {
                "scale": _scales(runs),
                GIVEN: _row(losses_at[GIVEN][name], references),
                BEST: _row(losses_at[BEST][name], references),
                "curves": {str(seed): _curve(result) for seed, result in runs.items()},
            }
            for name, runs in results.items()
            if runs
        },
        "differences": {scale: _differences(losses) for scale, losses in losses_at.items()},
        "failed": sum(result is None for result in measured.merged.values()),
        "problems": dict(problems),
    }


def _references(measured: SpecialistLosses) -> dict[str, Losses]:
    """Return the losses of the base, of each domain's own specialist, and of joint training."""
    base: dict[int, dict[str, float]] = {}
    joint: dict[int, dict[str, float]] = {}
    own: dict[int, dict[str, float]] = {seed: {} for seed in measured.seeds}
    for run in measured.runs:
        if run.mixer == JOINT:
            # Every run starts from the base, so any first evaluation is that of the base.
            base[run.seed] = {n: run.points[0].losses[n] for n in measured.domains}
            joint[run.seed] = {n: run.losses[n] for n in measured.domains}
        for name in measured.domains:
            if run.mixer == f"specialist-{name}":
                own[run.seed][name] = run.losses[name]
    return {BASE: base, SPECIALISTS: own, JOINT: joint}


def _matrix(measured: SpecialistLosses) -> dict[str, dict[str, float]]:
    """Return by specialist its mean loss over seeds on every domain."""
    matrix: dict[str, dict[str, float]] = {}
    for name in measured.domains:
        runs = [run for run in measured.runs if run.mixer == f"specialist-{name}"]
        matrix[name] = {
            domain: math.fsum(run.losses[domain] for run in runs) / len(runs)
            for domain in measured.domains
        }
    return matrix


def _test_losses(runs: Mapping[int, Mapping[str, Any]], scale: str) -> Losses:
    return {seed: result["test"][scale] for seed, result in runs.items()}


def _mean(losses: Mapping[str, float]) -> float:
    return math.fsum(losses.values()) / len(losses)


def _means(losses: Losses) -> dict[int, float]:
    return {seed: _mean(by_domain) for seed, by_domain in losses.items()}


def _row(losses: Losses, references: Mapping[str, Losses]) -> dict[str, Any]:
    means, base, own, joint = map(
        _means, (losses, references[BASE], references[SPECIALISTS], references[JOINT])
    )
    domains = list(next(iter(losses.values())))
    recovered = {
        seed: (base[seed] - mean) / (base[seed] - own[seed])
        for seed, mean in means.items()
        # Undefined where training the specialists changed nothing.
        if base[seed] != own[seed]
    }
    return {
        "mean": spread(means),
        "recovered": spread(recovered),
        "to_joint": paired(means, joint),
        "to_base": paired(means, base),
        "domains": {
            name: spread({seed: row[name] for seed, row in losses.items()}) for name in domains
        },
    }


def _scales(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    # A method without a scale has no options to search: `best` is empty.
    scales = {seed: run["best"]["scale"] for seed, run in runs.items() if run["best"]}
    return spread(scales) if scales else None


def _curve(result: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Return scale and loss on the search rows of the points of a search, sorted by scale."""
    points = [
        {"scale": point["options"].get("scale", 1.0), "loss": point["loss"]}
        for point in result["points"]
    ]
    return sorted(points, key=lambda point: point["scale"])


def _differences(by_method: Mapping[str, Losses]) -> dict[str, dict[str, Any]]:
    """Return the paired difference in mean loss between every two methods."""
    means = {name: _means(losses) for name, losses in by_method.items()}
    return {
        name: {base: paired(own, means[base]) for base in means if base != name}
        for name, own in means.items()
    }
