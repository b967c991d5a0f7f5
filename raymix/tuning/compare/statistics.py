"""Statistics of a comparison: run results to one JSON-able document; pure functions.

Losses are held-out, in nats per token, after the last step. Over seeds a measure has a mean and a
sample standard deviation. Differences to the baseline are paired by seed: a seed fixes the initial
parameters and the order of samples within each domain, so most of the variance between seeds
cancels. The interval is Student's t at 95 %, per measure and not corrected for multiplicity: of
twenty comparisons one is expected to exclude 0 by chance.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raymix.tuning.runs.results import EvaluationPoint, RunResult

FORMAT = 1
CONFIDENCE = 0.95
BySeed = Mapping[int, float]
Measure = Callable[[Mapping[str, float]], float]


def spread(values: BySeed) -> dict[str, Any]:
    """Return mean and sample standard deviation over seeds (None below two) of a measure."""
    array = np.array(list(values.values()), dtype=np.float64)
    return {
        "mean": float(array.mean()) if array.size else None,
        "sd": float(array.std(ddof=1)) if array.size > 1 else None,
        # JSON has no integer keys.
        "by_seed": {str(seed): float(value) for seed, value in values.items()},
    }


def paired(values: BySeed, baseline: BySeed) -> dict[str, Any] | None:
    """Return the mean difference to the baseline over common seeds, with its 95 % interval.

    The interval is None below two common seeds, the result None without a common seed.
    """
    # Imported here: loading scipy is slow, and most users of this module need no interval.
    from scipy.special import stdtrit

    common = [seed for seed in values if seed in baseline]
    if not common:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in common], dtype=np.float64)
    mean, count = float(differences.mean()), len(common)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": count}
    # Two-sided, so half of the remaining 5 % on each side.
    t = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    half = t * float(differences.std(ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": count}


def compare_runs(
    results: Sequence[RunResult],
    *,
    domains: Sequence[str],
    targets: Sequence[str] = (),
    baseline: str | None = None,
) -> dict[str, Any]:
    """Return the comparison; statistics are of finished runs, all runs are listed.

    Args:
        results: All runs; mixers are in the order of their first runs.
        domains: Domains of the corpus; those without held-out losses are left out.
        targets: Domains that no run trained on; they are not in the mean over domains.
        baseline: The mixer that differences are taken to; None for the first.
    """
    mixers = list(dict.fromkeys(result.mixer for result in results))
    base = baseline or mixers[0]
    done = {mixer: _finished(results, mixer) for mixer in mixers}
    scored = {name for runs in done.values() for run in runs.values() for name in run.losses}
    mixed = [name for name in domains if name in scored and name not in targets]
    # In the order given, not that of the set: the document must not depend on hashing.
    measured_targets = [name for name in targets if name in scored]
    measures = _measures(mixed, measured_targets)
    return {
        "format": FORMAT,
        "domains": mixed,
        "targets": measured_targets,
        "seeds": sorted({result.seed for result in results}),
        "baseline": base,
        "confidence": CONFIDENCE,
        "mixers": {
            mixer: {
                "runs": len(done[mixer]),
                "planned": sum(result.mixer == mixer for result in results),
                **_table(done[mixer], done[base], measures, domains=[*mixed, *measured_targets]),
                "worst_domain": _worst_domain(done[mixer], mixed),
                "extra": _extra(done[mixer]),
                "shares": _mean_shares(done[mixer]),
                "curve": _curve(done[mixer], measures, domains=[*mixed, *measured_targets]),
            }
            for mixer in mixers
        },
        "runs": [_run(result) for result in results],
    }


def _finished(results: Sequence[RunResult], mixer: str) -> dict[int, RunResult]:
    return {r.seed: r for r in results if r.mixer == mixer and r.losses}


def _measures(mixed: Sequence[str], targets: Sequence[str]) -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    if mixed:
        measures["mean"] = lambda losses: float(np.mean([losses[name] for name in mixed]))
        measures["worst"] = lambda losses: max(losses[name] for name in mixed)
    if targets:
        measures["target"] = lambda losses: float(np.mean([losses[name] for name in targets]))
    return measures


def _table(
    runs: Mapping[int, RunResult],
    base: Mapping[int, RunResult],
    measures: Mapping[str, Measure],
    *,
    domains: Sequence[str],
) -> dict[str, Any]:
    def row(measure: Measure) -> dict[str, Any]:
        own, baseline = ({s: measure(r.losses) for s, r in g.items()} for g in (runs, base))
        return {**spread(own), "difference": paired(own, baseline)}

    return {
        **{name: row(measure) for name, measure in measures.items()},
        "domains": {name: row(_loss_of(name)) for name in domains},
    }


def _loss_of(name: str) -> Measure:
    # A function, not a lambda in a loop: such a lambda would see the last name only.
    return lambda losses: losses[name]


def _worst_domain(runs: Mapping[int, RunResult], mixed: Sequence[str]) -> str | None:
    """Return the domain with the highest mean loss over seeds."""
    if not runs or not mixed:
        return None
    return max(mixed, key=lambda name: float(np.mean([r.losses[name] for r in runs.values()])))


def _extra(runs: Mapping[int, RunResult]) -> dict[str, Any]:
    """Return the cost of the mixer's probes, absolute and relative to that of training."""
    last = {seed: run.points[-1] for seed, run in runs.items()}
    return {
        "seconds": spread({seed: run.extra_seconds for seed, run in runs.items()}),
        "seconds_share": spread(
            {s: run.extra_seconds / run.seconds if run.seconds else 0.0 for s, run in runs.items()}
        ),
        "flops": spread({seed: point.extra_flops for seed, point in last.items()}),
        "flops_share": spread(
            {s: p.extra_flops / p.flops if p.flops else 0.0 for s, p in last.items()}
        ),
        "training_seconds": spread({seed: run.seconds for seed, run in runs.items()}),
        "training_flops": spread({seed: point.flops for seed, point in last.items()}),
    }


def _mean_shares(runs: Mapping[int, RunResult]) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs.values() for name in run.shares)
    # A domain without a share has weight 0 in that run, so it counts in the mean.
    return {
        name: float(np.mean([run.shares.get(name, 0.0) for run in runs.values()])) for name in names
    }


def _curve(
    runs: Mapping[int, RunResult], measures: Mapping[str, Measure], *, domains: Sequence[str]
) -> dict[str, Any]:
    """Return losses by step: mean, minimum and maximum over seeds, at the steps all seeds have."""
    by_step = [{point.step: point for point in run.points} for run in runs.values()]
    steps = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    points_by_step = [[points[step] for points in by_step] for step in steps]
    return {
        "step": steps,
        "tokens": [_mean([p.tokens for p in points]) for points in points_by_step],
        "flops": [_mean([p.flops + p.extra_flops for p in points]) for points in points_by_step],
        **{name: _band(points_by_step, measure) for name, measure in measures.items()},
        "domains": {name: _band(points_by_step, _loss_of(name)) for name in domains},
    }


def _band(
    points_by_step: Sequence[Sequence[EvaluationPoint]], measure: Measure
) -> dict[str, list[float]]:
    values = [[measure(point.losses) for point in points] for points in points_by_step]
    return {
        "mean": [_mean(row) for row in values],
        "low": [min(row) for row in values],
        "high": [max(row) for row in values],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _run(result: RunResult) -> dict[str, Any]:
    last = result.points[-1] if result.points else None
    return {
        "mixer": result.mixer,
        "seed": result.seed,
        "state": result.state,
        "problem": result.problem,
        "run": result.path,
        "step": last.step if last else 0,
        "tokens": last.tokens if last else 0,
        "seconds": result.seconds,
        "extra_seconds": result.extra_seconds,
        "shares": dict(result.shares),
        "losses": dict(result.losses),
    }


def to_csv(document: Mapping[str, Any]) -> str:
    """Return the finished runs as a mixture table in CSV: `run`, `step`, `share.*`, `loss.*`."""
    runs = [run for run in document["runs"] if run["state"] == "done"]
    names = [*document["domains"], *document["targets"]]
    shares = list(dict.fromkeys(name for run in runs for name in run["shares"]))
    header = ["run", "mixer", "seed", "step", "tokens", "seconds", "extra_seconds"]
    text = io.StringIO()
    # The csv module ends lines with CRLF by default.
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, *(f"share.{n}" for n in shares), *(f"loss.{n}" for n in names)])
    for run in runs:
        values = [run["shares"].get(n, 0.0) for n in shares] + [run["losses"][n] for n in names]
        fields = [Path(run["run"]).name, *(run[key] for key in header[1:])]
        writer.writerow([*fields, *values])
    return text.getvalue()
