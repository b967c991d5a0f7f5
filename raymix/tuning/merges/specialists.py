"""`raymix specialists`: base, one specialist per domain, joint training, merged specialists.

Per seed: the base is trained on the recipe's mixture (unless the recipe's model is a checkpoint).
From it start one specialist per domain, trained on that domain alone, and one joint run over all of
them in equal shares, with as many tokens as all specialists together. Every merge method then
merges the specialists with its options as given (scale 1), and at the best scale on held-out rows
that the reported losses do not use. Finished runs and searches are kept: the same command resumes.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymix.errors import MergeError, RecipeError, TrainingError, format_problem
from raymix.merging.recipe import MergeFile, load_merge
from raymix.merging.registry import get_method
from raymix.merging.run.settings import check_options
from raymix.merging.search_space import SCALE, search_space
from raymix.recipe import PretrainedModel, Recipe, StaticMixer, load_recipe
from raymix.store import Corpus, atomic_write_text
from raymix.store.remote.hub import fetch_model
from raymix.training.host.machine import Resources, resources
from raymix.training.run.checkpoint import newest_checkpoint
from raymix.training.run.pinned_model import pretrained_repo
from raymix.training.run.rundir import RunDirectory
from raymix.tuning.merges.scoring import HeldOut, Search
from raymix.tuning.merges.specialist_stats import SpecialistLosses, specialist_stats
from raymix.tuning.merges.trials import SearchTrial
from raymix.tuning.mixtures.candidates import smoke_changes
from raymix.tuning.runs.group import Group, locked, make_runs, output_directory, read_results
from raymix.tuning.runs.planning import ComparisonPlan, TrialResources
from raymix.tuning.runs.results import RunResult
from raymix.tuning.runs.trials import Outcome, run_trials
from raymix.tuning.runs.variants import Variant, as_trial, changed_recipe, steps_of

BASE, JOINT = "base", "joint"
METHODS: dict[str, dict[str, Any]] = {
    "drm-h": {"merge_method": "drm", "direction": "horizontal"},
    "drm-v": {"merge_method": "drm", "direction": "vertical"},
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties", "density": 0.2},
    "tsv": {"merge_method": "tsv"},
    "knots": {"merge_method": "knots", "density": 0.2},
    "iso_c": {"merge_method": "iso_c"},
    "iso_cts": {"merge_method": "iso_cts"},
    "dare_ties": {"merge_method": "dare_ties", "density": 0.5},
    "della": {"merge_method": "della", "density": 0.5},
    "breadcrumbs": {"merge_method": "breadcrumbs", "density": 0.9},
    "linear": {"merge_method": "linear"},
    "multislerp": {"merge_method": "multislerp"},
    "model_stock": {"merge_method": "model_stock"},
}
"""Merge methods by default: all, with the pruning rates of their authors."""

# Evaluations per run after that of step 0: only final losses are compared here.
_EVALUATIONS = 1
_SMOKE_TRIALS = 4


@dataclass(frozen=True, slots=True)
class _Setting:
    """Recipes, domains, methods, seeds, output directory and machine."""

    recipe: Recipe
    tuned: Recipe
    """The recipe of a specialist, without its domain and its base."""
    domains: tuple[str, ...]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    out: Path
    machine: Resources
    parallel: int | None

    @property
    def base_given(self) -> bool:
        """Return whether the recipe's model is a checkpoint, which then is the base."""
        return isinstance(self.recipe.model, PretrainedModel)

    def bases(self) -> Group:
        """Return the runs that train the bases."""
        runs = [
            Variant(BASE, seed, self._run(self.recipe, f"{BASE}-seed{seed}", seed))
            for seed in self.seeds
        ]
        return Group(self.recipe, runs, self.out, self.machine, self.parallel)

    def tunings(self, base_of: Mapping[int, str] | None) -> Group:
        """Return the runs that start from the bases; None: from scratch, for the plan."""
        # Joint training sees as many tokens as all specialists together: the same compute.
        longer = self.tuned.train.model_copy(
            update={"steps": len(self.domains) * steps_of(self.tuned), "tokens": None}
        )
        joint = self.tuned.model_copy(update={"train": longer})
        runs = [
            Variant(label, seed, self._tuning(recipe, label, domains, seed, base_of))
            for seed in self.seeds
            for label, recipe, domains in (
                *((specialist(name), self.tuned, (name,)) for name in self.domains),
                (JOINT, joint, self.domains),
            )
        ]
        return Group(self.tuned, runs, self.out, self.machine, self.parallel)

    def _tuning(
        self,
        recipe: Recipe,
        label: str,
        domains: Sequence[str],
        seed: int,
        base_of: Mapping[int, str] | None,
    ) -> Recipe:
        shares = {name: 1 / len(domains) for name in domains}
        mixer = StaticMixer(kind="static", weights=shares, targets=self.recipe.mixer.targets)
        model = recipe.model
        if base_of is not None:
            model = PretrainedModel(kind="pretrained", path=base_of[seed])
        changed = recipe.model_copy(update={"mixer": mixer, "model": model})
        return self._run(changed, f"{label}-seed{seed}", seed)

    def _run(self, recipe: Recipe, name: str, seed: int) -> Recipe:
        return as_trial(recipe, f"{self.out}/{name}", seed, points=_EVALUATIONS)


def specialist(domain: str) -> str:
    """Return the label of the specialist of a domain."""
    return f"specialist-{domain}"


def specialists(
    recipe: Recipe | str | os.PathLike[str],
    *,
    seeds: int = 1,
    out: str | os.PathLike[str] | None = None,
    parallel: int | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """Train and merge specialists; return the comparison with base, specialists and joint training.

    `out` gets a directory per run, `merges/METHOD-seedN` per search, `specialists.json` and, where
    matplotlib is installed, `specialists.html`.

    Args:
        recipe: The recipe, or its path; its section `specialists` configures the command.
        seeds: Number of repetitions; their seeds count up from the recipe's.
        out: Output directory; None for `NAME-specialists` beside the recipe's run directory.
        parallel: Concurrent runs or merges; None for one per core or GPU, as memory allows.
        smoke: Tiny runs and few merges, to try all stages in a minute or two.

    Raises:
        RaymixError: If something cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command resumes.
    """
    setting = _setting(load_recipe(recipe), seeds, out, parallel, smoke=smoke)
    corpus = _prepared(setting)
    held_out = HeldOut.of(
        setting.tuned, corpus, setting.domains, setting.recipe.specialists.search_rows
    )
    with locked(setting.out, "run of specialists"):
        # In this order: runs start from checkpoints of the bases, searches from those of runs.
        bases = _bases(setting, corpus)
        group = setting.tunings(bases)
        plan = group.plan(corpus)
        results = read_results(group, plan, corpus, make_runs(group, plan, corpus))
        _refuse_failed(results)
        searches = _searches(setting, bases, held_out, plan.trial_resources)
        outcome = _merge(setting, searches, plan.trial_resources)
        document = _document(setting, corpus, plan, held_out, results)
        merged = {name: trial.result() for name, trial in searches.items()}
        measured = SpecialistLosses(
            setting.domains, setting.seeds, tuple(setting.methods), results, merged
        )
        document |= specialist_stats(measured, outcome.problems)
        document["files"] = _write(document, setting.out)
    return document


def _setting(
    recipe: Recipe,
    seeds: int,
    out: str | os.PathLike[str] | None,
    parallel: int | None,
    *,
    smoke: bool,
) -> _Setting:
    for option, value in (("--seeds", seeds), ("--parallel", parallel)):
        if value is not None and value < 1:
            raise RecipeError.at(option, value, "too small", allowed="Allowed: 1 or more")
    config = recipe.specialists
    tuned = changed_recipe(recipe, config.finetune, "specialists.finetune")
    if smoke:
        recipe, tuned = (load_recipe(r, smoke_changes(r)) for r in (recipe, tuned))
        trials = min(config.trials, _SMOKE_TRIALS)
        config = config.model_copy(update={"trials": trials, "search_rows": None})
        recipe = recipe.model_copy(update={"specialists": config})
    if recipe.train.parallel == "fsdp2":
        raise RecipeError.at(
            "train.parallel",
            "fsdp2",
            "a specialist is one process here, whose model cannot be sharded",
            fix="Set train.parallel: ddp, and a model that fits one process",
        )
    lora = recipe.model.lora or tuned.model.lora
    if lora is not None:
        raise RecipeError.at(
            "model.lora",
            lora.model_dump(exclude_defaults=True),
            "bases and specialists are merged here as whole models",
            fix="Leave it out, or merge adapters that `raymix train` made with `raymix merge`",
        )
    methods = config.methods or METHODS
    _check_methods(methods)
    names = [domain.name for domain in recipe.corpus.domains]
    domains = config.domains or tuple(n for n in names if n not in recipe.mixer.targets)
    directory = output_directory(out, recipe, f"specialists{'-smoke' if smoke else ''}")
    machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
    seed_range = tuple(range(recipe.seed, recipe.seed + seeds))
    return _Setting(recipe, tuned, domains, methods, seed_range, directory, machine, parallel)


def _check_methods(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise RecipeError for unknown methods and options, with one message per method."""
    problems: list[str] = []
    for name, options in methods.items():
        try:
            # Names in place of models: options are checked before any model exists.
            check_options(_merge_file(options, "base", ["one", "two"]))
        except MergeError as error:
            problems += [f"specialists.methods.{name}: {message}" for message in error.problems]
    if problems:
        raise RecipeError(*problems)


def _merge_file(options: Mapping[str, Any], base: str, models: Sequence[str]) -> MergeFile:
    parameters = {key: value for key, value in options.items() if key != "merge_method"}
    document: dict[str, Any] = {
        "merge_method": options["merge_method"],
        "models": [{"model": model} for model in models],
        "parameters": parameters,
    }
    if get_method(str(options["merge_method"])).base != "none":
        document["base_model"] = base
    return load_merge(document)


def _prepared(setting: _Setting) -> Corpus:
    """Return the prepared corpus; all runs pass preflight before and after its preparation."""
    # Imported here: preparation loads modules that refusals do not need.
    from raymix.corpus.open_or_prepare import open_or_prepare

    def refuse(corpus: Corpus | None) -> None:
        if not setting.base_given:
            setting.bases().plan(corpus)
        setting.tunings(None).plan(corpus)

    corpus = open_or_prepare(
        setting.recipe.corpus,
        lambda: refuse(None),
        wait_minutes=setting.recipe.cluster.wait_minutes,
    )
    if not setting.domains:  # a recipe without sources has its domains in the corpus
        raise RecipeError.at("specialists.domains", [], "no domain is named", fix="Name two")
    refuse(corpus)
    return corpus


def _bases(setting: _Setting, corpus: Corpus) -> dict[int, str]:
    """Train the bases that are missing; return the checkpoint directory of each seed's base."""
    model = setting.recipe.model
    if isinstance(model, PretrainedModel):
        repo = pretrained_repo(model)
        path = model.path if repo is None else str(fetch_model(repo))
        return dict.fromkeys(setting.seeds, path)
    group = setting.bases()
    plan = group.plan(corpus)
    results = read_results(group, plan, corpus, make_runs(group, plan, corpus))
    _refuse_failed(results)
    checkpoints: dict[int, str] = {}
    for result in results:
        newest = newest_checkpoint(RunDirectory(Path(result.path)).checkpoints)
        assert newest is not None, "a finished run has a checkpoint"
        checkpoints[result.seed] = str(newest[0])
    return checkpoints


def _refuse_failed(results: Sequence[RunResult]) -> None:
    """Raise TrainingError with the failed runs, since merges need all of them."""
    failed = [result for result in results if result.state != "done"]
    if failed:
        raise TrainingError(
            *(format_problem(r.mixer, f"seed {r.seed}", r.problem or "it failed") for r in failed)
        )


def _searches(
    setting: _Setting, bases: Mapping[int, str], held_out: HeldOut, trial_resources: TrialResources
) -> dict[tuple[str, int], SearchTrial]:
    """Return the search of every method and seed."""
    searches: dict[tuple[str, int], SearchTrial] = {}
    for seed in setting.seeds:
        models = [_checkpoint(setting, specialist(name), seed) for name in setting.domains]
        for name, options in setting.methods.items():
            file = _merge_file(options, bases[seed], models)
            scaled = get_method(file.merge_method).scaled_by is not None
            # A method without a scale has one point, its merge as given.
            label = f"{name}-seed{seed}"
            search = Search(
                file,
                search_space(file, SCALE) if scaled else (),
                setting.recipe.specialists.trials if scaled else 1,
                held_out,
                setting.out / "merges" / label,
            )
            searches[name, seed] = SearchTrial(label, search, trial_resources.threads)
    return searches


def _checkpoint(setting: _Setting, label: str, seed: int) -> str:
    newest = newest_checkpoint(RunDirectory(setting.out / f"{label}-seed{seed}").checkpoints)
    assert newest is not None, "a finished run has a checkpoint"
    return str(newest[0])


def _merge(
    setting: _Setting,
    searches: Mapping[tuple[str, int], SearchTrial],
    trial_resources: TrialResources,
) -> Outcome:
    """Run the searches that are not finished; return how they ended."""
    remaining = [trial for trial in searches.values() if trial.result() is None]
    if not remaining:
        return Outcome()
    print(
        f"{len(searches)} searches of merges, {len(searches) - len(remaining)} of them finished "
        f"before; {min(trial_resources.parallel, len(remaining))} at once, "
        f"in {setting.out / 'merges'}",
        flush=True,
    )
    return run_trials(
        remaining,
        out=setting.out,
        # Also if runs have Ray Train workers, a search over merges is one process.
        trial_resources=replace(trial_resources, workers=0),
        cluster=setting.recipe.cluster,
        done=len(searches) - len(remaining),
    )


def _document(
    setting: _Setting,
    corpus: Corpus,
    plan: ComparisonPlan,
    held_out: HeldOut,
    results: Sequence[RunResult],
) -> dict[str, Any]:
    """Return the setting part of the document."""
    # Specialists have the same length, so the plan of the first stands for all.
    run_plan = plan.plans[specialist(setting.domains[0])]
    model = setting.recipe.model
    given = model.path if isinstance(model, PretrainedModel) else None
    base_steps = None if given else steps_of(setting.recipe)
    return {
        "name": setting.recipe.name,
        "out": str(setting.out),
        "seeds": list(setting.seeds),
        "domains": list(setting.domains),
        "base": given,
        "base_steps": base_steps,
        "base_tokens": None if base_steps is None else base_steps * setting.recipe.data.step_tokens,
        "steps": run_plan.steps,
        "tokens": run_plan.tokens,
        "joint_tokens": plan.plans[JOINT].tokens,
        "parameters": run_plan.parameters,
        "corpus": corpus.path,
        "corpus_fingerprint": corpus.fingerprint,
        "held_out": held_out.document(),
        "methods": {name: dict(options) for name, options in setting.methods.items()},
        "seconds": sum(result.seconds for result in results),
    }


def _write(document: Mapping[str, Any], out: Path) -> list[str]:
    """Write the data and, with matplotlib, the page; return their paths."""
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write_text(str(out / "specialists.json"), text + "\n")
    written = [str(out / "specialists.json")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.pages.specialists import specialists_page

        atomic_write_text(str(out / "specialists.html"), specialists_page(document))
        written.append(str(out / "specialists.html"))
    return written
