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
from raymix.tuning.runs.group import Group, announce, make_trial, read_results, refuse_full_disk
from raymix.tuning.runs.planning import ComparisonPlan, TrialResources, run_stages
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.trial_task import RunTrial
from raymix.tuning.runs.trials import (
    Outcome,
    TrialPlan,
    progress_sources_of,
    run_trial_plan,
    trial_at,
)

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
    found = run_stages(group.variants, corpus, plan.plans)
    return [n for n, state in found.items() if state != "done" and not _is_cut(group.out / n)]


def _run_design(
    recipe: Recipe, group: Group, plan: ComparisonPlan, corpus: Corpus, space: Space
) -> Outcome:
    remaining = _left(group, plan, corpus)
    if not remaining:
        return Outcome()
    one, total = next(iter(plan.plans.values())), len(group.variants)
    refuse_full_disk(one, len(remaining))
    session = uuid.uuid4().hex[:12]
    trials = [
        make_trial(v, plan.plans[v.mixer], plan.trial_resources, session)
        for v in group.variants
        if v.name in remaining
    ]
    announce(one, plan.trial_resources, total=total, remaining=len(remaining), out=group.out)
    early = recipe.tune.scheduler == "asha"
    trial_plan = TrialPlan(
        progress_sources_of(trials),
        partial(trial_at, trials=tuple(trials)),
        scheduler=_asha(one.steps) if early else None,
        objective=loss_weights(recipe, space) if early else None,
    )
    return run_trial_plan(
        trial_plan,
        out=group.out,
        trial_resources=plan.trial_resources,
        cluster=group.recipe.cluster,
        done=total - len(remaining),
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

    remaining = _left(group, plan, corpus)
    total = max(recipe.tune.runs, len(record.mixtures))
    names = [*remaining, *(mixture_name(at) for at in range(len(record.mixtures), total))]
    if not names:
        return Outcome()
    one = next(iter(plan.plans.values()))
    refuse_full_disk(one, len(names))
    announce(one, plan.trial_resources, total=total, remaining=len(names), out=group.out)
    searcher = MixtureSearcher(recipe, record, names, space=space, out=group.out, steps=one.steps)
    make = partial(
        _proposed,
        proxy=group.recipe,
        run_plan=one,
        trial_resources=plan.trial_resources,
        out=str(group.out),
        session=uuid.uuid4().hex[:12],
    )
    watched = {name: (group.out / name / "metrics.jsonl", one.steps) for name in names}
    return run_trial_plan(
        TrialPlan(watched, make, searcher=searcher),
        out=group.out,
        trial_resources=plan.trial_resources,
        cluster=group.recipe.cluster,
        done=total - len(names),
    )


def _proposed(
    config: Mapping[str, Any],
    *,
    proxy: Recipe,
    run_plan: RunPlan,
    trial_resources: TrialResources,
    out: str,
    session: str,
) -> RunTrial:
    """Return the run of a mixture that the searcher named; called in the run's own process."""
    mixture = Mixture(name=config["name"], origin="", shares=config["shares"])
    return make_trial(variant(proxy, mixture, out=out), run_plan, trial_resources, session)
