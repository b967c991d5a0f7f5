"""`raymix.compare`: run one recipe under several mixers and seeds, and write the statistics."""

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
    """Train the runs that are not done, and return the comparison of the mixers.

    Every run has a directory `MIXER-seedN` in `out`; finished runs are not repeated, others resume
    from their checkpoints. `out` also gets `compare.json`, `compare.csv` and, where matplotlib is
    installed, `compare.html`. The corpus is prepared first if it is not.

    Args:
        recipe: The recipe that all runs share, or its path.
        mixers: Mixer specs, separated by commas; see `raymix.tuning.runs.variants`.
        seeds: Runs per mixer; their seeds count up from the recipe's.
        out: Directory of the comparison; None for `NAME-compare` beside the recipe's run directory.
        parallel: Concurrent runs; None for one per core or GPU, as far as memory allows.
        baseline: The mixer that differences are taken to; None for the first.

    Raises:
        RaymixError: If a run cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command resumes.
    """
    loaded = load_recipe(recipe)
    group = _group(loaded, mixers, seeds, out, parallel)
    # Before the corpus is prepared: a typo should not cost the minutes of a preparation.
    base = _baseline(group.variants, baseline)
    corpus, plan = _prepared(group)
    # Reading is inside the lock too: another process could change the runs meanwhile.
    with locked(group.out, "comparison"):
        outcome = make_runs(group, plan, corpus)
        results = read_results(group, plan, corpus, outcome)
        document = _document(group, plan, corpus, results, base)
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
    directory = output_directory(out, recipe, "compare")
    variants = make_variants(recipe, mixers, seeds=seeds, out=str(directory))
    machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
    return Group(recipe, variants, directory, machine, parallel)


def _baseline(variants: Sequence[Variant], requested: str | None) -> str:
    known = labels(variants)
    base = known[0] if requested is None else requested
    if base not in known:
        raise RecipeError.at(
            "--baseline",
            base,
            "not one of the mixers",
            allowed=f"Compared are: {', '.join(known)}",
            fix=did_you_mean(base, known),
        )
    return base


def _prepared(group: Group) -> tuple[Corpus, ComparisonPlan]:
    """Return the corpus and the plan; the plan is checked before and after the preparation."""
    # Imported here: preparation loads tokenizers and Ray Data, which refusals do not need.
    from raymix.corpus.open_or_prepare import open_or_prepare

    # Without a corpus only some checks are possible; the others follow once it is there.
    corpus = open_or_prepare(
        group.recipe.corpus,
        lambda: group.plan(None),
        wait_minutes=group.recipe.cluster.wait_minutes,
    )
    return corpus, group.plan(corpus)


def _document(
    group: Group,
    plan: ComparisonPlan,
    corpus: Corpus,
    results: Sequence[RunResult],
    baseline: str,
) -> dict[str, Any]:
    """Return the document: setting, statistics and runs."""
    # Steps and tokens are the same under all mixers of a comparison.
    first_plan = next(iter(plan.plans.values()))
    targets = group.variants[0].recipe.mixer.targets
    facts = {
        "name": group.recipe.name,
        "out": str(group.out),
        "steps": first_plan.steps,
        "tokens": first_plan.tokens,
        "parameters": first_plan.parameters,
        "flops_per_token": first_plan.flops_per_token,
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
    """Write data, table and, with matplotlib, the page; return their paths."""
    text = json.dumps(document, ensure_ascii=False, indent=1)
    atomic_write_text(str(out / "compare.json"), text + "\n")
    atomic_write_text(str(out / "compare.csv"), to_csv(document))
    written = [str(out / "compare.json"), str(out / "compare.csv")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.pages.comparison import comparison_page

        atomic_write_text(str(out / "compare.html"), comparison_page(document))
        written.append(str(out / "compare.html"))
    return written
