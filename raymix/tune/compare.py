"""`compare`: one recipe under several mixers and seeds, and what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix.errors import RecipeError, did_you_mean, problem
from raymix.recipe import Recipe, load_recipe
from raymix.store import Corpus, atomic_write_text
from raymix.train.machine import Resources, resources
from raymix.train.rundir import RunDirectory
from raymix.train.setup import Job
from raymix.tune.comparison import compare_runs, to_csv
from raymix.tune.planning import ComparisonPlan, disk_problem, find_runs, plan_comparison
from raymix.tune.results import RunResult, State, read_result
from raymix.tune.trials import Outcome, Trial, run_trials
from raymix.tune.variants import Variant, labels, make_variants


@dataclass(frozen=True, slots=True)
class _Setting:
    """What is compared, and where."""

    recipe: Recipe
    variants: Sequence[Variant]
    out: Path
    has: Resources
    parallel: int | None
    baseline: str


def compare(
    recipe: Recipe | str | os.PathLike[str],
    *,
    mixers: str,
    seeds: int = 3,
    out: str | os.PathLike[str] | None = None,
    parallel: int | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Return the comparison of mixers on one recipe, having trained what was not trained yet.

    Every run has a directory `MIXER-seedN` in `out`; finished ones are not repeated, begun ones go
    on from their checkpoints. `out` also gets `compare.json`, `compare.csv` and, where matplotlib
    is installed, `compare.html`. The corpus is prepared first where that has not been done.

    Args:
        recipe: What all runs have in common, or the path of it.
        mixers: Mixers, separated by commas; see `raymix.tune.variants`.
        seeds: Runs per mixer; their seeds count up from the recipe's.
        out: Directory of the comparison; left out, `runs/NAME-compare`.
        parallel: Runs at once; left out, one per core or GPU, as far as memory goes.
        baseline: The mixer that differences are to; left out, the first.

    Raises:
        RaymixError: If a run cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command goes on.
    """
    loaded = load_recipe(recipe)
    setting = _setting(loaded, mixers, seeds, out, parallel, baseline)
    corpus, plan = _prepared(setting)
    with ExitStack() as held:
        _lock(setting.out, held)
        found = find_runs(setting.variants, corpus, plan.plans)
        left = [variant for variant in setting.variants if found[variant.name] != "done"]
        outcome = _make(setting, plan, left) if left else Outcome()
        document = _compared(setting, plan, corpus, outcome)
        document["files"] = _write(document, setting.out)
    return document


def _setting(
    recipe: Recipe,
    mixers: str,
    seeds: int,
    out: str | os.PathLike[str] | None,
    parallel: int | None,
    baseline: str | None,
) -> _Setting:
    for option, value in (("--seeds", seeds), ("--parallel", parallel)):
        if value is not None and value < 1:
            raise RecipeError(problem(option, value, "too small", "Allowed: 1 or more"))
    directory = Path(os.path.abspath(out or Path("runs") / f"{recipe.name}-compare"))
    if directory.exists() and not directory.is_dir():
        raise RecipeError(problem("--out", str(directory), "a file, not a directory"))
    if (directory / "resolved.yaml").exists():
        wrong = "the directory of a single run"
        raise RecipeError(problem("--out", str(directory), wrong, "Give another"))
    variants = make_variants(recipe, mixers, seeds=seeds, out=str(directory))
    known = labels(variants)
    base = known[0] if baseline is None else baseline
    if base not in known:
        near = did_you_mean(base, known)
        allowed = f"Compared are: {', '.join(known)}"
        raise RecipeError(problem("--baseline", base, "not one of the mixers", allowed, near))
    cluster = recipe.cluster
    has = resources(cluster.address, cluster.object_store_bytes)
    return _Setting(recipe, variants, directory, has, parallel, base)


def _prepared(setting: _Setting) -> tuple[Corpus, ComparisonPlan]:
    """Return the corpus, prepared, and the plan; refuse what cannot work before preparing it."""
    from raymix.corpus.opening import open_or_prepare

    def planned(corpus: Corpus | None) -> ComparisonPlan:
        return plan_comparison(setting.variants, corpus, setting.has, parallel=setting.parallel)

    corpus = open_or_prepare(setting.recipe.corpus, lambda: planned(None))
    return corpus, planned(corpus)


def _lock(out: Path, held: ExitStack) -> None:
    try:
        held.enter_context(RunDirectory(out).locked())
    except RecipeError as error:
        wrong = "another comparison is at work in it"
        raise RecipeError(problem("--out", str(out), wrong, "Wait for it, or stop it")) from error


def _make(setting: _Setting, plan: ComparisonPlan, left: Sequence[Variant]) -> Outcome:
    """Return how the runs that were not finished ended."""
    full = disk_problem(plan.plans[left[0].mixer], len(left))
    if full is not None:
        raise RecipeError(full)
    session = uuid.uuid4().hex[:12]
    trials = [_trial(variant, plan, session) for variant in left]
    seats, total = plan.seats, len(setting.variants)
    one = next(iter(plan.plans.values()))
    print(
        f"{total} runs of {one.steps:,} steps ({one.tokens:,} tokens), {total - len(left)} of them "
        f"finished before; {min(seats.parallel, len(left))} at once, "
        f"{'a GPU' if seats.gpus else f'{seats.threads} thread' + 's' * (seats.threads > 1)} each, "
        f"in {setting.out}",
        flush=True,
    )
    return run_trials(
        trials,
        out=setting.out,
        seats=seats,
        cluster=setting.recipe.cluster,
        done=total - len(left),
    )


def _trial(variant: Variant, plan: ComparisonPlan, session: str) -> Trial:
    planned = plan.plans[variant.mixer]
    job = Job(
        recipe=variant.recipe,
        run=RunDirectory(Path(variant.recipe.run_dir)),
        steps=planned.steps,
        micro_batch_rows=planned.micro_batch_rows,
        on_gpu=planned.on_gpu,
        threads=plan.seats.threads,
        session=session,
    )
    return Trial(variant.name, job, planned.parameters)


def _compared(
    setting: _Setting, plan: ComparisonPlan, corpus: Corpus, outcome: Outcome
) -> dict[str, Any]:
    """Return the document: the setting, the statistics, the runs."""
    found = find_runs(setting.variants, corpus, plan.plans)
    flops = {label: planned.flops_per_token for label, planned in plan.plans.items()}
    results: list[RunResult] = []
    for variant in setting.variants:
        ended: State = "done" if found[variant.name] == "done" else "failed"
        said = outcome.problems.get(variant.name, "it did not reach its last step")
        results.append(
            read_result(
                variant,
                ended,
                flops_per_token=flops[variant.mixer],
                problem=said if ended == "failed" else None,
            )
        )
    one = next(iter(plan.plans.values()))
    targets = setting.variants[0].recipe.mixer.targets
    facts = {
        "name": setting.recipe.name,
        "out": str(setting.out),
        "steps": one.steps,
        "tokens": one.tokens,
        "parameters": one.parameters,
        "flops_per_token": one.flops_per_token,
        "corpus": corpus.path,
        "corpus_fingerprint": corpus.fingerprint,
        "sections": {
            v.mixer: v.recipe.mixer.model_dump(mode="json") for v in reversed(setting.variants)
        },
        "failed": sum(result.state != "done" for result in results),
    }
    statistics = compare_runs(
        results, domains=corpus.domain_names, targets=targets, baseline=setting.baseline
    )
    return {**facts, **statistics}


def _write(document: Mapping[str, Any], out: Path) -> list[str]:
    """Return the files written: data, table, and page where it can be drawn."""
    twin = json.dumps(document, ensure_ascii=False, indent=1)
    atomic_write_text(str(out / "compare.json"), twin + "\n")
    atomic_write_text(str(out / "compare.csv"), to_csv(document))
    written = [str(out / "compare.json"), str(out / "compare.csv")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.comparison import comparison_page

        atomic_write_text(str(out / "compare.html"), comparison_page(document))
        written.append(str(out / "compare.html"))
    return written
