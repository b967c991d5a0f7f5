"""`raymix.tune`: proxy runs of many mixtures, a law of their losses, its optimum, verification."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix._utils.json import jsonable
from raymix.errors import RecipeError
from raymix.laws import MixtureTable
from raymix.laws.files import save_law
from raymix.recipe import Recipe, load_recipe
from raymix.store import Corpus, atomic_write_text
from raymix.training.host.machine import Resources, resources
from raymix.tuning.mixtures.candidates import (
    Mixture,
    MixtureSpace,
    check_run_count,
    loss_weights,
    optimum_mixture,
    proxy_recipe,
    references,
    smoke_config,
    space_of,
    variant,
)
from raymix.tuning.mixtures.learn import (
    LearnedLaw,
    check_law,
    law_accuracy,
    learn,
    mixture_table,
    optimum_path,
    predict_mixture,
    slices,
)
from raymix.tuning.mixtures.proxy_runs import run_proxies
from raymix.tuning.mixtures.search_log import IfExists, SearchLog, free_directory
from raymix.tuning.mixtures.verify import observed_runs, roles_of, verify_mixtures
from raymix.tuning.runs.group import Group, locked, make_runs, output_directory, read_results
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.variants import steps_of

FORMAT = 1


@dataclass(frozen=True, slots=True)
class _TuneJob:
    """Recipe, recipe of the proxy runs, output directory and machine of a search."""

    recipe: Recipe
    proxy: Recipe
    out: Path
    machine: Resources
    parallel: int | None

    def group(self, mixtures: Sequence[Mixture], seeds: Sequence[int] = ()) -> Group:
        """Return the runs of mixtures: proxy runs, or verification runs if seeds are given."""
        out, run_seeds = str(self.out), [*seeds] or [None]
        runs = [variant(self.proxy, m, out=out, seed=seed) for seed in run_seeds for m in mixtures]
        # A sequential search has more runs than mixtures so far; resources are for all of them.
        total = None if seeds else max(self.recipe.tune.runs, len(runs))
        return Group(self.proxy, runs, self.out, self.machine, self.parallel, total)


def tune(
    recipe: Recipe | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    parallel: int | None = None,
    smoke: bool = False,
    if_exists: IfExists = "resume",
) -> dict[str, Any]:
    """Find the best shares of a recipe with a mixing law, and verify them; return the document.

    Trains proxy runs of the mixtures of a design (or of sequential proposals), fits a law to the
    table of their losses and minimizes it. The optimum, the two best observed mixtures, uniform and
    proportional shares are then run on new seeds. Finished runs are not repeated, others resume
    from their checkpoints. `out` gets `mixtures.csv`, `law.json`, `tune.json` and, where matplotlib
    is installed, `tune.html`.

    Args:
        recipe: The recipe, or its path; its section `tune` configures the search.
        out: Directory of the search; None for `NAME-tune` beside the recipe's run directory.
        parallel: Concurrent runs; None for one per core or GPU, as far as memory allows.
        smoke: A few tiny runs, to try all stages in minutes; into `runs/NAME-tune-smoke`.
        if_exists: If `out` holds a search: `resume`, `fail`, or `new` for another directory beside
            it.

    Raises:
        RaymixError: If a run cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command resumes.
    """
    job = _search(load_recipe(recipe), out, parallel, smoke=smoke, if_exists=if_exists)
    corpus, space = _prepared(job)
    with locked(job.out, "search"):
        log = SearchLog.open(job.out, job.recipe, space, corpus.fingerprint)
        results = run_proxies(job.recipe, job.group, log, corpus=corpus, space=space)
        shares = {mixture.name: mixture.shares for mixture in log.mixtures}
        table = mixture_table(results, shares, space)
        table.write(job.out / "mixtures.csv")
        learned = learn(table, job.recipe, space)
        # Table and law are written before the verification, which may take as long as all else.
        save_law(job.out / "law.json", learned.law, learned.report)
        document = _law_document(job, corpus, space, learned, table)
        runs = observed_runs(results, log.mixtures, learned.objective)
        document |= _verification_document(job, corpus, space, learned, runs)
        document["files"] = _write(document, job.out)
    return document


def _search(
    recipe: Recipe,
    out: str | os.PathLike[str] | None,
    parallel: int | None,
    *,
    smoke: bool,
    if_exists: IfExists,
) -> _TuneJob:
    if parallel is not None and parallel < 1:
        raise RecipeError.at("--parallel", parallel, "too small", allowed="Allowed: 1 or more")
    check_law(recipe.tune.law)
    if smoke:
        recipe = recipe.model_copy(update={"tune": smoke_config(recipe.tune)})
    proxy = proxy_recipe(recipe, smoke=smoke)
    if proxy.train.parallel == "fsdp2":
        raise RecipeError.at(
            "train.parallel",
            "fsdp2",
            "a small run is one process, whose model cannot be sharded",
            fix="Give it a model that fits one process: tune.proxy, with train.parallel: ddp",
        )
    horizon, steps = recipe.tune.horizon, steps_of(proxy)
    if horizon is not None and horizon < steps:
        raise RecipeError.at(
            "tune.horizon",
            horizon,
            f"shorter than the small runs, which have {steps:,} steps",
            fix="Raise it, leave it out, or set tune.proxy: {train.steps: N}",
        )
    directory = output_directory(out, recipe, f"tune{'-smoke' if smoke else ''}")
    machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
    return _TuneJob(recipe, proxy, free_directory(directory, if_exists), machine, parallel)


def _prepared(job: _TuneJob) -> tuple[Corpus, MixtureSpace]:
    """Return the prepared corpus and the feasible mixtures; preflight runs before preparation."""
    # Imported here: preparation loads modules that refusals do not need.
    from raymix.corpus.open_or_prepare import open_or_prepare

    def refuse() -> None:
        names = [d.name for d in job.recipe.corpus.domains]
        mixed = [name for name in names if name not in job.recipe.mixer.targets]
        # Limits need the corpus; any mixture will do to check recipe, machine and memory.
        even = dict.fromkeys(mixed, 1 / len(mixed))
        job.group([Mixture(name="uniform", origin="", shares=even)]).plan(None)

    corpus = open_or_prepare(
        job.recipe.corpus, refuse, wait_minutes=job.recipe.cluster.wait_minutes
    )
    space = space_of(job.recipe, corpus)
    check_run_count(job.recipe.tune, space)
    return corpus, space


def _law_document(
    job: _TuneJob, corpus: Corpus, space: MixtureSpace, learned: LearnedLaw, table: MixtureTable
) -> dict[str, Any]:
    """Return the setting, the law, its accuracy and its optimum."""
    recipe, steps = job.recipe, steps_of(job.proxy)
    return {
        "format": FORMAT,
        "name": recipe.name,
        "out": str(job.out),
        "mode": recipe.tune.mode,
        "design": recipe.tune.design,
        "steps": steps,
        "horizon": learned.objective.horizon,
        "corpus": corpus.path,
        "corpus_fingerprint": corpus.fingerprint,
        "domains": list(space.domains),
        "targets": list(space.targets),
        "weights": loss_weights(recipe, space),
        "minimax": recipe.tune.minimax,
        "rows": len(table),
        "law": learned.report.law,
        "report": learned.report.document(),
        "judged": law_accuracy(learned, table),
        "optimum": learned.optimum.document(),
        "path": optimum_path(learned, recipe, table),
        "slices": slices(learned, space, step=float(steps)),
    }


def _verification_document(
    job: _TuneJob,
    corpus: Corpus,
    space: MixtureSpace,
    learned: LearnedLaw,
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Run the verification; return its results and the proxy runs."""
    steps = float(steps_of(job.proxy))
    optimum = optimum_mixture(learned.optimum.shares, space)
    roles = roles_of(runs, optimum, references(space))
    # New seeds: the best observed mixtures were chosen by the old one and would look too good.
    seeds = [job.proxy.seed + 1 + offset for offset in range(job.recipe.tune.verify)]
    results: list[RunResult] = []
    if seeds:
        # By name, since one mixture may have two roles, such as uniform and best observed.
        group = job.group(list({m.name: m for m in roles.values()}.values()), seeds)
        plan = group.plan(corpus)
        results = read_results(group, plan, corpus, make_runs(group, plan, corpus))
    table = verify_mixtures(roles, results, learned, space=space, step=steps)
    tried = [
        {
            **run,
            "predicted": predict_mixture(learned, run["shares"], step=run["step"] or steps)[
                "value"
            ],
        }
        for run in runs
    ]
    problems = {
        Path(run.path).name: run.problem or "" for run in results if run.state != "done"
    } | {run["name"]: run["problem"] or "" for run in runs if run["state"] == "failed"}
    return {
        "seeds": seeds,
        "runs": tried,
        "verified": table,
        "failed": len(problems),
        "problems": problems,
    }


def _write(document: Mapping[str, Any], out: Path) -> list[str]:
    """Write the document and, with matplotlib, the page; return the files of the search."""
    _write_json(out / "tune.json", document)
    written = [str(out / name) for name in ("tune.json", "mixtures.csv", "law.json")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.pages.tuning import tuning_page

        atomic_write_text(str(out / "tune.html"), tuning_page(document))
        written.append(str(out / "tune.html"))
    return written


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    # `jsonable` turns NaN and infinity to null; `allow_nan=False` proves it: JSON has neither.
    text = json.dumps(jsonable(document), ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write_text(str(path), text + "\n")
