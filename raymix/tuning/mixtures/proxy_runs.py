"""The small runs of a search: all of a design at once, or each proposed after those before."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.training.plan.runplan import RunPlan
from raymix.tuning.mixtures.candidates import (
    Mixture,
    Space,
    loss_weights,
    mixture_name,
    variant,
)
from raymix.tuning.mixtures.search_log import CUT, SearchLog
from raymix.tuning.runs.group import Group, announce, read_results, refuse_full_disk, trial_of
from raymix.tuning.runs.planning import ComparisonPlan, TrialResources, find_runs
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.trial_task import RunTrial
from raymix.tuning.runs.trials import Outcome, TrialPlan, listed, run_trial_plan, watched_of

_GRACE = 0.25
_REDUCTION = 3


def run_proxies(
    recipe: Recipe,
    group_of: Callable[[Sequence[Mixture]], Group],
    record: SearchLog,
    *,
    corpus: Corpus,
    space: Space,
) -> list[RunResult]:
    """Return what every small run came to, having made those that were not finished.

    Args:
        recipe: The recipe of the search.
        group_of: Returns the runs of mixtures.
        record: The mixtures so far; those proposed are added.
        corpus: The prepared corpus.
        space: The mixtures allowed.
    """
    group = group_of(record.mixtures)
    plan = group.plan(corpus)
    if recipe.tune.mode == "design":
        outcome = _run_design(recipe, group, plan, corpus, space)
    else:
        outcome = _run_proposed(recipe, group, plan, record, corpus, space)
        group = group_of(record.mixtures)
        plan = group.plan(corpus)
    for name, state in outcome.states.items():
        if state == "cut":
            (group.out / name / CUT).touch()
    results = read_results(group, plan, corpus, outcome)
    return [_as_cut(result) if _is_cut(group.out / result.mixer) else result for result in results]


def _is_cut(run: Path) -> bool:
    return (run / CUT).exists()


def _as_cut(result: RunResult) -> RunResult:
    return replace(result, state="stopped", problem=None)


def _left(group: Group, plan: ComparisonPlan, corpus: Corpus) -> list[str]:
    """Return the runs that are to be made or continued."""
    found = find_runs(group.variants, corpus, plan.plans)
    return [n for n, state in found.items() if state != "done" and not _is_cut(group.out / n)]


def _run_design(
    recipe: Recipe, group: Group, plan: ComparisonPlan, corpus: Corpus, space: Space
) -> Outcome:
    left = _left(group, plan, corpus)
    if not left:
        return Outcome()
    one, total = next(iter(plan.plans.values())), len(group.variants)
    refuse_full_disk(one, len(left))
    session = uuid.uuid4().hex[:12]
    trials = [
        trial_of(v, plan.plans[v.mixer], plan.seats, session)
        for v in group.variants
        if v.name in left
    ]
    announce(one, plan.seats, total=total, left=len(left), out=group.out)
    early = recipe.tune.scheduler == "asha"
    course = TrialPlan(
        watched_of(trials),
        partial(listed, trials=tuple(trials)),
        scheduler=_asha(one.steps) if early else None,
        objective=loss_weights(recipe, space) if early else None,
    )
    return run_trial_plan(
        course,
        out=group.out,
        seats=plan.seats,
        cluster=group.recipe.cluster,
        done=total - len(left),
    )


def _asha(steps: int) -> Any:
    """Return asynchronous successive halving (Li et al. 2020) on the loss after so many steps."""
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="step",
        metric="objective",
        mode="min",
        max_t=steps,
        grace_period=max(1, round(_GRACE * steps)),
        reduction_factor=_REDUCTION,
    )


def _run_proposed(
    recipe: Recipe,
    group: Group,
    plan: ComparisonPlan,
    record: SearchLog,
    corpus: Corpus,
    space: Space,
) -> Outcome:
    from raymix.tuning.mixtures.searchers import MixtureSearcher

    left = _left(group, plan, corpus)
    total = max(recipe.tune.runs, len(record.mixtures))
    names = [*left, *(mixture_name(at) for at in range(len(record.mixtures), total))]
    if not names:
        return Outcome()
    one = next(iter(plan.plans.values()))
    refuse_full_disk(one, len(names))
    announce(one, plan.seats, total=total, left=len(names), out=group.out)
    searcher = MixtureSearcher(recipe, record, names, space=space, out=group.out, steps=one.steps)
    make = partial(
        _proposed,
        proxy=group.recipe,
        planned=one,
        seats=plan.seats,
        out=str(group.out),
        session=uuid.uuid4().hex[:12],
    )
    watched = {name: (group.out / name / "metrics.jsonl", one.steps) for name in names}
    return run_trial_plan(
        TrialPlan(watched, make, searcher=searcher),
        out=group.out,
        seats=plan.seats,
        cluster=group.recipe.cluster,
        done=total - len(names),
    )


def _proposed(
    config: Mapping[str, Any],
    *,
    proxy: Recipe,
    planned: RunPlan,
    seats: TrialResources,
    out: str,
    session: str,
) -> RunTrial:
    """Return the run of a mixture that the searcher named; called in the run's own process."""
    mixture = Mixture(name=config["name"], origin="", shares=config["shares"])
    return trial_of(variant(proxy, mixture, out=out), planned, seats, session)
