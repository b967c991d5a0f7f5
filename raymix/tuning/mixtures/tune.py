"""`tune`: small runs of many mixtures, a law of their losses, its optimum, runs to verify it."""

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
    Space,
    loss_weights,
    optimum_mixture,
    proxy_recipe,
    references,
    refuse_few,
    smoke_config,
    space_of,
    variant,
)
from raymix.tuning.mixtures.learn import (
    LearnedLaw,
    check_law,
    judged,
    learn,
    mixture_table,
    path_of_optima,
    predicted,
    slices,
)
from raymix.tuning.mixtures.proxy_runs import run_proxies
from raymix.tuning.mixtures.search_log import IfExists, SearchLog, free_directory
from raymix.tuning.mixtures.verify import observed, roles_of, verified
from raymix.tuning.runs.group import Group, locked, make_runs, output_directory, read_results
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.variants import steps_of

FORMAT = 1


@dataclass(frozen=True, slots=True)
class _Search:
    """What is looked for, and where."""

    recipe: Recipe
    proxy: Recipe
    out: Path
    machine: Resources
    parallel: int | None

    def group(self, mixtures: Sequence[Mixture], seeds: Sequence[int] = ()) -> Group:
        """Return the runs of mixtures: small ones, or with seeds those that verify."""
        out, chosen = str(self.out), [*seeds] or [None]
        runs = [variant(self.proxy, m, out=out, seed=seed) for seed in chosen for m in mixtures]
        # Where mixtures are proposed, those known are not all that will be run.
        most = None if seeds else max(self.recipe.tune.runs, len(runs))
        return Group(self.proxy, runs, self.out, self.machine, self.parallel, most)


def tune(
    recipe: Recipe | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    parallel: int | None = None,
    smoke: bool = False,
    if_exists: IfExists = "resume",
) -> dict[str, Any]:
    """Return the best shares a law finds for a recipe, and what they came to when tried.

    Small runs of the mixtures of a design (or of mixtures proposed one by one), a mixture table, a
    law fitted to it, its optimum; then the optimum, the best mixtures observed, uniform and
    proportional shares are run on new seeds. Finished runs are not repeated, begun ones go on from
    their checkpoints. `out` gets `mixtures.csv`, `law.json`, `tune.json` and, where matplotlib is
    installed, `tune.html`.

    Args:
        recipe: The recipe, or the path of it; its section `tune` says how to look.
        out: Directory of the search; left out, `runs/NAME-tune`.
        parallel: Runs at once; left out, one per core or GPU, as far as memory goes.
        smoke: A few tiny runs, to see the whole way in minutes; into `runs/NAME-tune-smoke`.
        if_exists: What to do where `out` holds a search: `resume`, `fail`, or `new` for another
            directory beside it.

    Raises:
        RaymixError: If a run cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command goes on.
    """
    search = _search(load_recipe(recipe), out, parallel, smoke=smoke, if_exists=if_exists)
    corpus, space = _prepared(search)
    with locked(search.out, "search"):
        record = SearchLog.open(search.out, search.recipe, space, corpus.fingerprint)
        results = run_proxies(search.recipe, search.group, record, corpus=corpus, space=space)
        shares = {mixture.name: mixture.shares for mixture in record.mixtures}
        table = mixture_table(results, shares, space)
        table.write(search.out / "mixtures.csv")
        learned = learn(table, search.recipe, space)
        save_law(search.out / "law.json", learned.law, learned.report)
        document = _learned_part(search, corpus, space, learned, table)
        runs = observed(results, record.mixtures, learned.objective)
        document |= _verified_part(search, corpus, space, learned, runs)
        document["files"] = _write(document, search.out)
    return document


def _search(
    recipe: Recipe,
    out: str | os.PathLike[str] | None,
    parallel: int | None,
    *,
    smoke: bool,
    if_exists: IfExists,
) -> _Search:
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
    directory = output_directory(out, f"{recipe.name}-tune{'-smoke' if smoke else ''}")
    machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
    return _Search(recipe, proxy, free_directory(directory, if_exists), machine, parallel)


def _prepared(search: _Search) -> tuple[Corpus, Space]:
    """Return the corpus, prepared, and the mixtures allowed; refuse what cannot work before."""
    from raymix.corpus.open_or_prepare import open_or_prepare

    def refuse() -> None:
        names = [d.name for d in search.recipe.corpus.domains]
        mixed = [name for name in names if name not in search.recipe.mixer.targets]
        even = dict.fromkeys(mixed, 1 / len(mixed))
        search.group([Mixture(name="uniform", origin="", shares=even)]).plan(None)

    corpus = open_or_prepare(search.recipe.corpus, refuse)
    space = space_of(search.recipe, corpus)
    refuse_few(search.recipe.tune, space)
    return corpus, space


def _learned_part(
    search: _Search, corpus: Corpus, space: Space, learned: LearnedLaw, table: MixtureTable
) -> dict[str, Any]:
    """Return what is known before anything is verified."""
    recipe, steps = search.recipe, steps_of(search.proxy)
    return {
        "format": FORMAT,
        "name": recipe.name,
        "out": str(search.out),
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
        "judged": judged(learned, table),
        "optimum": learned.optimum.document(),
        "path": path_of_optima(learned, recipe, table),
        "slices": slices(learned, space, step=float(steps)),
    }


def _verified_part(
    search: _Search,
    corpus: Corpus,
    space: Space,
    learned: LearnedLaw,
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the small runs and, having made them, those that verify."""
    steps = float(steps_of(search.proxy))
    optimum = optimum_mixture(learned.optimum.shares, space)
    roles = roles_of(runs, optimum, references(space))
    seeds = [search.proxy.seed + 1 + at for at in range(search.recipe.tune.verify)]
    results: list[RunResult] = []
    if seeds:
        group = search.group(list({m.name: m for m in roles.values()}.values()), seeds)
        plan = group.plan(corpus)
        results = read_results(group, plan, corpus, make_runs(group, plan, corpus))
    table = verified(roles, results, learned, space=space, step=steps)
    tried = [
        {**run, "predicted": predicted(learned, run["shares"], step=run["step"] or steps)["value"]}
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
    """Return the files of the search, having written those that come last."""
    _write_json(out / "tune.json", document)
    written = [str(out / name) for name in ("tune.json", "mixtures.csv", "law.json")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.pages.tuning import tuning_page

        atomic_write_text(str(out / "tune.html"), tuning_page(document))
        written.append(str(out / "tune.html"))
    return written


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(jsonable(document), ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write_text(str(path), text + "\n")
