"""`compare`: one recipe under several mixers and seeds, and what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymix.errors import RecipeError, did_you_mean
from raymix.recipe import Recipe, load_recipe
from raymix.store import Corpus, atomic_write_text
from raymix.training.host.machine import resources
from raymix.tuning.compare.statistics import compare_runs, to_csv
from raymix.tuning.runs.group import Group, locked, make_runs, output_directory, read_results
from raymix.tuning.runs.planning import ComparisonPlan
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.variants import Variant, labels, make_variants


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
        mixers: Mixers, separated by commas; see `raymix.tuning.runs.variants`.
        seeds: Runs per mixer; their seeds count up from the recipe's.
        out: Directory of the comparison; left out, `runs/NAME-compare`.
        parallel: Runs at once; left out, one per core or GPU, as far as memory goes.
        baseline: The mixer that differences are to; left out, the first.

    Raises:
        RaymixError: If a run cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command goes on.
    """
    loaded = load_recipe(recipe)
    group = _group(loaded, mixers, seeds, out, parallel)
    base = _baseline(group.variants, baseline)
    corpus, plan = _prepared(group)
    with locked(group.out, "comparison"):
        outcome = make_runs(group, plan, corpus)
        results = read_results(group, plan, corpus, outcome)
        document = _compared(group, plan, corpus, results, base)
        document["files"] = _write(document, group.out)
    return document


def _group(
    recipe: Recipe,
    mixers: str,
    seeds: int,
    out: str | os.PathLike[str] | None,
    parallel: int | None,
) -> Group:
    for option, value in (("--seeds", seeds), ("--parallel", parallel)):
        if value is not None and value < 1:
            raise RecipeError.at(option, value, "too small", allowed="Allowed: 1 or more")
    directory = output_directory(out, f"{recipe.name}-compare")
    variants = make_variants(recipe, mixers, seeds=seeds, out=str(directory))
    has = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
    return Group(recipe, variants, directory, has, parallel)


def _baseline(variants: Sequence[Variant], asked: str | None) -> str:
    known = labels(variants)
    base = known[0] if asked is None else asked
    if base not in known:
        near = did_you_mean(base, known)
        raise RecipeError.at(
            "--baseline",
            base,
            "not one of the mixers",
            allowed=f"Compared are: {', '.join(known)}",
            fix=near,
        )
    return base


def _prepared(group: Group) -> tuple[Corpus, ComparisonPlan]:
    """Return the corpus, prepared, and the plan; refuse what cannot work before preparing it."""
    from raymix.corpus.open_or_prepare import open_or_prepare

    corpus = open_or_prepare(group.recipe.corpus, lambda: group.plan(None))
    return corpus, group.plan(corpus)


def _compared(
    group: Group,
    plan: ComparisonPlan,
    corpus: Corpus,
    results: Sequence[RunResult],
    baseline: str,
) -> dict[str, Any]:
    """Return the document: the setting, the statistics, the runs."""
    one = next(iter(plan.plans.values()))
    targets = group.variants[0].recipe.mixer.targets
    facts = {
        "name": group.recipe.name,
        "out": str(group.out),
        "steps": one.steps,
        "tokens": one.tokens,
        "parameters": one.parameters,
        "flops_per_token": one.flops_per_token,
        "corpus": corpus.path,
        "corpus_fingerprint": corpus.fingerprint,
        "sections": {
            v.mixer: v.recipe.mixer.model_dump(mode="json") for v in reversed(group.variants)
        },
        "failed": sum(result.state != "done" for result in results),
    }
    statistics = compare_runs(
        results, domains=corpus.domain_names, targets=targets, baseline=baseline
    )
    return {**facts, **statistics}


def _write(document: Mapping[str, Any], out: Path) -> list[str]:
    """Return the files written: data, table, and page where it can be drawn."""
    twin = json.dumps(document, ensure_ascii=False, indent=1)
    atomic_write_text(str(out / "compare.json"), twin + "\n")
    atomic_write_text(str(out / "compare.csv"), to_csv(document))
    written = [str(out / "compare.json"), str(out / "compare.csv")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.pages.comparison import comparison_page

        atomic_write_text(str(out / "compare.html"), comparison_page(document))
        written.append(str(out / "compare.html"))
    return written
