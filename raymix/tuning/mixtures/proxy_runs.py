"""Execution of the proxy runs: a whole design at once, or mixtures proposed sequentially.

Early stopping is by ASHA; a run that it cut is marked on disk and not resumed.
"""

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
    MixtureSpace,
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

# No run is cut before a quarter of its steps: losses of the warm-up do not rank mixtures. Of the
# runs that reach a rung, one in three goes on.
_GRACE_FRACTION = 0.25
_REDUCTION_FACTOR = 3


def run_proxies(
    recipe: Recipe,
    group_of: Callable[[Sequence[Mixture]], Group],
    log: SearchLog,
    *,
    corpus: Corpus,
    space: MixtureSpace,
) -> list[RunResult]:
    """Run the proxy runs that are not done, and return the results of all.

    Args:
        recipe: The recipe of the search.
        group_of: Builds the group of the runs of mixtures.
        log: The mixtures so far; proposed ones are added.
        corpus: The prepared corpus.
        space: The feasible mixtures.
    """
    group = group_of(log.mixtures)
    plan = group.plan(corpus)
    if recipe.tune.mode == "design":
        outcome = _run_design(recipe, group, plan, corpus, space)
    else:
        outcome = _run_proposed(recipe, group, plan, log, corpus, space)
        # Again: the log has grown by the mixtures that were proposed.
        group = group_of(log.mixtures)
        plan = group.plan(corpus)
    # On disk, because a resumed search must not train a run that the scheduler gave up.
    for name, state in outcome.states.items():
        if state == "cut":
            (group.out / name / CUT).touch()
    results = read_results(group, plan, corpus, outcome)
    return [_as_cut(result) if _is_cut(group.out / result.mixer) else result for result in results]


def _is_cut(run: Path) -> bool:
    return (run / CUT).exists()


def _as_cut(result: RunResult) -> RunResult:
    return replace(result, state="stopped", problem=None)


def _remaining(group: Group, plan: ComparisonPlan, corpus: Corpus) -> list[str]:
    """Return the names of the runs that are not done and were not cut."""
    stages = run_stages(group.variants, corpus, plan.plans)
    return [n for n, state in stages.items() if state != "done" and not _is_cut(group.out / n)]


def _run_design(
    recipe: Recipe, group: Group, plan: ComparisonPlan, corpus: Corpus, space: MixtureSpace
) -> Outcome:
    remaining = _remaining(group, plan, corpus)
    if not remaining:
        return Outcome()
    run_plan, total = next(iter(plan.plans.values())), len(group.variants)
    refuse_full_disk(run_plan, len(remaining))
    session = uuid.uuid4().hex[:12]
    trials = [
        make_trial(v, plan.plans[v.mixer], plan.trial_resources, session)
        for v in group.variants
        if v.name in remaining
    ]
    announce(run_plan, plan.trial_resources, total=total, remaining=len(remaining), out=group.out)
    early = recipe.tune.scheduler == "asha"
    trial_plan = TrialPlan(
        progress_sources_of(trials),
        partial(trial_at, trials=tuple(trials)),
        scheduler=_asha(run_plan.steps) if early else None,
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
    """Return asynchronous successive halving (ASHA, Li et al. 2020) on the objective."""
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="step",
        metric="objective",
        mode="min",
        max_t=steps,
        grace_period=max(1, round(_GRACE_FRACTION * steps)),
        reduction_factor=_REDUCTION_FACTOR,
    )


def _run_proposed(
    recipe: Recipe,
    group: Group,
    plan: ComparisonPlan,
    log: SearchLog,
    corpus: Corpus,
    space: MixtureSpace,
) -> Outcome:
    # Imported here: a design needs no searcher.
    from raymix.tuning.mixtures.searchers import MixtureSearcher

    remaining = _remaining(group, plan, corpus)
    total = max(recipe.tune.runs, len(log.mixtures))
    # First the runs that a stopped call left behind, then new proposals.
    names = [*remaining, *(mixture_name(index) for index in range(len(log.mixtures), total))]
    if not names:
        return Outcome()
    # All proxy runs differ in their shares only, so any plan stands for those to come.
    run_plan = next(iter(plan.plans.values()))
    refuse_full_disk(run_plan, len(names))
    announce(run_plan, plan.trial_resources, total=total, remaining=len(names), out=group.out)
    searcher = MixtureSearcher(recipe, log, names, space=space, out=group.out, steps=run_plan.steps)
    make = partial(
        _proposed_trial,
        proxy=group.recipe,
        run_plan=run_plan,
        trial_resources=plan.trial_resources,
        out=str(group.out),
        session=uuid.uuid4().hex[:12],
    )
    progress_sources = {
        name: (group.out / name / "metrics.jsonl", run_plan.steps) for name in names
    }
    return run_trial_plan(
        TrialPlan(progress_sources, make, searcher=searcher),
        out=group.out,
        trial_resources=plan.trial_resources,
        cluster=group.recipe.cluster,
        done=total - len(names),
    )


def _proposed_trial(
    config: Mapping[str, Any],
    *,
    proxy: Recipe,
    run_plan: RunPlan,
    trial_resources: TrialResources,
    out: str,
    session: str,
) -> RunTrial:
    """Return the trial of a proposed mixture; called in the process of the trial."""
    mixture = Mixture(name=config["name"], origin="", shares=config["shares"])
    return make_trial(variant(proxy, mixture, out=out), run_plan, trial_resources, session)
