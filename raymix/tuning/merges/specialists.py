"""`specialists`: a base, a specialist per domain, joint training, and the specialists merged.

Per seed: the base is trained on the recipe's mixture (a recipe with a checkpoint for a model has
its base already); from it come one model per domain, trained on that domain alone, and one trained
on all of them in equal shares on as many tokens as all specialists together. Every merge method
then makes one model of the specialists, as its options stand (scale 1) and at the scale that is
best on held-out rows that the reported losses are not of. Everything finished is kept: running it
again goes on.
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
from raymix.training.host.machine import Resources, resources
from raymix.training.run.checkpoint import newest_checkpoint
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
"""What is merged where the recipe does not say: every method, pruning as its authors do."""

# Evaluations of a run besides that of its beginning: curves are not what this is about.
_EVALUATIONS = 1
_SMOKE_TRIALS = 4


@dataclass(frozen=True, slots=True)
class _Setting:
    """What is made, and where."""

    recipe: Recipe
    tuned: Recipe
    """The recipe of a specialist, but for its domain and its base."""
    domains: tuple[str, ...]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    out: Path
    machine: Resources
    parallel: int | None

    @property
    def base_given(self) -> bool:
        """Return whether the recipe's model is the base as it is."""
        return isinstance(self.recipe.model, PretrainedModel)

    def bases(self) -> Group:
        """Return the runs that train the bases."""
        runs = [
            Variant(BASE, seed, self._run(self.recipe, f"{BASE}-seed{seed}", seed))
            for seed in self.seeds
        ]
        return Group(self.recipe, runs, self.out, self.machine, self.parallel)

    def tunings(self, base_of: Mapping[int, str] | None) -> Group:
        """Return the runs that start from the bases; None: as if they started from nothing."""
        k = len(self.domains)
        longer = self.tuned.train.model_copy(
            update={"steps": k * steps_of(self.tuned), "tokens": None}
        )
        whole = self.tuned.model_copy(update={"train": longer})
        runs = [
            Variant(label, seed, self._tuning(recipe, label, domains, seed, base_of))
            for seed in self.seeds
            for label, recipe, domains in (
                *((specialist(name), self.tuned, (name,)) for name in self.domains),
                (JOINT, whole, self.domains),
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
        weights = {name: 1 / len(domains) for name in domains}
        mixer = StaticMixer(kind="static", weights=weights, targets=self.recipe.mixer.targets)
        model = recipe.model
        if base_of is not None:
            model = PretrainedModel(kind="pretrained", path=base_of[seed])
        changed = recipe.model_copy(update={"mixer": mixer, "model": model})
        return self._run(changed, f"{label}-seed{seed}", seed)

    def _run(self, recipe: Recipe, name: str, seed: int) -> Recipe:
        return as_trial(recipe, f"{self.out}/{name}", seed, points=_EVALUATIONS)


def specialist(domain: str) -> str:
    """Return what the specialist of a domain is called."""
    return f"specialist-{domain}"


def specialists(
    recipe: Recipe | str | os.PathLike[str],
    *,
    seeds: int = 1,
    out: str | os.PathLike[str] | None = None,
    parallel: int | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """Return how merged specialists do beside their base, themselves and joint training.

    `out` gets a directory per run, `merges/METHOD-seedN` per search, `specialists.json` and, where
    matplotlib is installed, `specialists.html`.

    Args:
        recipe: The recipe, or the path of it; its section `specialists` says what is made.
        seeds: How often all of it; seeds count up from the recipe's.
        out: Directory of everything; left out, `runs/NAME-specialists`.
        parallel: Runs, or merges, at once; left out, one per core or GPU, as memory allows.
        smoke: Tiny runs and few merges, to see the whole way in a minute or two.

    Raises:
        RaymixError: If something cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command goes on.
    """
    setting = _setting(load_recipe(recipe), seeds, out, parallel, smoke=smoke)
    corpus = _prepared(setting)
    held_out = HeldOut.of(
        setting.tuned, corpus, setting.domains, setting.recipe.specialists.search_rows
    )
    with locked(setting.out, "run of specialists"):
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
    methods = config.methods or METHODS
    _check_methods(methods)
    names = [domain.name for domain in recipe.corpus.domains]
    domains = config.domains or tuple(n for n in names if n not in recipe.mixer.targets)
    directory = output_directory(out, f"{recipe.name}-specialists{'-smoke' if smoke else ''}")
    machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
    counted = tuple(range(recipe.seed, recipe.seed + seeds))
    return _Setting(recipe, tuned, domains, methods, counted, directory, machine, parallel)


def _check_methods(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise RecipeError for methods and options that there are not, each with its name."""
    problems: list[str] = []
    for name, options in methods.items():
        try:
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
    """Return the corpus, prepared; refuse what cannot work before anything is made."""
    from raymix.corpus.open_or_prepare import open_or_prepare

    def refuse(corpus: Corpus | None) -> None:
        if not setting.base_given:
            setting.bases().plan(corpus)
        setting.tunings(None).plan(corpus)

    corpus = open_or_prepare(setting.recipe.corpus, lambda: refuse(None))
    if not setting.domains:  # a recipe without sources has its domains in the corpus
        raise RecipeError.at("specialists.domains", [], "no domain is named", fix="Name two")
    refuse(corpus)
    return corpus


def _bases(setting: _Setting, corpus: Corpus) -> dict[int, str]:
    """Return the base of each seed as a directory, having trained those that were not."""
    model = setting.recipe.model
    if isinstance(model, PretrainedModel):
        return dict.fromkeys(setting.seeds, model.path)
    group = setting.bases()
    plan = group.plan(corpus)
    results = read_results(group, plan, corpus, make_runs(group, plan, corpus))
    _refuse_failed(results)
    found: dict[int, str] = {}
    for result in results:
        newest = newest_checkpoint(RunDirectory(Path(result.path)).checkpoints)
        assert newest is not None, "a finished run has a checkpoint"
        found[result.seed] = str(newest[0])
    return found


def _refuse_failed(results: Sequence[RunResult]) -> None:
    """Raise an error that names the runs that failed: what follows is built on all of them."""
    failed = [result for result in results if result.state != "done"]
    if failed:
        raise TrainingError(
            *(format_problem(r.mixer, f"seed {r.seed}", r.problem or "it failed") for r in failed)
        )


def _searches(
    setting: _Setting, bases: Mapping[int, str], held_out: HeldOut, trial_resources: TrialResources
) -> dict[tuple[str, int], SearchTrial]:
    """Return the search of every method and seed."""
    found: dict[tuple[str, int], SearchTrial] = {}
    for seed in setting.seeds:
        models = [_checkpoint(setting, specialist(name), seed) for name in setting.domains]
        for name, options in setting.methods.items():
            file = _merge_file(options, bases[seed], models)
            scaled = get_method(file.merge_method).scaled_by is not None
            label = f"{name}-seed{seed}"
            search = Search(
                file,
                search_space(file, SCALE) if scaled else (),
                setting.recipe.specialists.trials if scaled else 1,
                held_out,
                setting.out / "merges" / label,
            )
            found[name, seed] = SearchTrial(label, search, trial_resources.threads)
    return found


def _checkpoint(setting: _Setting, label: str, seed: int) -> str:
    newest = newest_checkpoint(RunDirectory(setting.out / f"{label}-seed{seed}").checkpoints)
    assert newest is not None, "a finished run has a checkpoint"
    return str(newest[0])


def _merge(
    setting: _Setting,
    searches: Mapping[tuple[str, int], SearchTrial],
    trial_resources: TrialResources,
) -> Outcome:
    """Return how the searches that were not finished ended, having made them."""
    left = [trial for trial in searches.values() if trial.result() is None]
    if not left:
        return Outcome()
    print(
        f"{len(searches)} searches of merges, {len(searches) - len(left)} of them finished "
        f"before; {min(trial_resources.parallel, len(left))} at once, in {setting.out / 'merges'}",
        flush=True,
    )
    return run_trials(
        left,
        out=setting.out,
        # Whatever trains the models, a search of merges is one process.
        trial_resources=replace(trial_resources, workers=0),
        cluster=setting.recipe.cluster,
        done=len(searches) - len(left),
    )


def _document(
    setting: _Setting,
    corpus: Corpus,
    plan: ComparisonPlan,
    held_out: HeldOut,
    results: Sequence[RunResult],
) -> dict[str, Any]:
    """Return the setting, for the record."""
    one = plan.plans[specialist(setting.domains[0])]
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
        "steps": one.steps,
        "tokens": one.tokens,
        "joint_tokens": plan.plans[JOINT].tokens,
        "parameters": one.parameters,
        "corpus": corpus.path,
        "corpus_fingerprint": corpus.fingerprint,
        "held_out": held_out.document(),
        "methods": {name: dict(options) for name, options in setting.methods.items()},
        "seconds": sum(result.seconds for result in results),
    }


def _write(document: Mapping[str, Any], out: Path) -> list[str]:
    """Return the files written: data, and page where it can be drawn."""
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write_text(str(out / "specialists.json"), text + "\n")
    written = [str(out / "specialists.json")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.pages.specialists import specialists_page

        atomic_write_text(str(out / "specialists.html"), specialists_page(document))
        written.append(str(out / "specialists.html"))
    return written
