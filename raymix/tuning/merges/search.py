"""`raymix merge --search`: the scale, the drop rate or other numbers of a merge, by held-out loss.

Each point is a merge that is made, scored on rows to choose by, and removed; a round of points runs
through Ray Tune, as wide as cores and memory allow. Then the file's own merge, the chosen one, the
base and the models themselves are scored on the test rows, which no choice has seen, and the chosen
merge is written. Points stay on disk beside the output: the same command goes on from them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix._utils.yaml import dump_yaml
from raymix.errors import MergeError, RecipeError, TrainingError, format_problem
from raymix.merging.checkpoints.models import writes_adapter
from raymix.merging.checkpoints.output import OutputWorkspace
from raymix.merging.recipe import MergeFile, load_merge
from raymix.merging.run.engine import merge
from raymix.merging.run.plan import MergePlan, plan_merge
from raymix.merging.search_space import apply_point, search_space, start_point
from raymix.recipe import ClusterConfig, PretrainedModel, Recipe
from raymix.store import Corpus, atomic_write_text
from raymix.training.host.machine import Resources, resources
from raymix.training.launch.cluster import ray_cluster
from raymix.training.model.hf_model import CorpusFacts, resolve_config
from raymix.tuning.merges.scoring import HeldOut, Search, best_of, mean_loss, refuse_another
from raymix.tuning.merges.trials import PointTrial, ScoreTrial, round_of
from raymix.tuning.runs.group import locked
from raymix.tuning.runs.planning import TrialResources, divide_machine
from raymix.tuning.runs.trial_task import TrialTask
from raymix.tuning.runs.trials import run_trials

FORMAT = 1
TRIALS = {1: 11}
"""Points by default, by the number of options; of two or more `_MANY`."""
_MANY = 25
_SUFFIX = "-search"
# A model in fp32 beside the logits of a few rows, and what a merge works in.
_FP32_COPIES = 3


def search_merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergeFile,
    out: str | os.PathLike[str],
    *,
    search: str,
    recipe: Recipe,
    overrides: Sequence[str] = (),
    trials: int | None = None,
    workers: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return what a search came to, having written the merge it chose to the new directory `out`.

    `OUT-search` gets a file per point, `merge.yaml` (the chosen merge), `search_result.json` and,
    where matplotlib is installed, `search.svg`.

    Args:
        source: A merge file, its content, or a MergeFile; its own values are the first point.
        out: A directory that is not there yet.
        search: Options to look for, e.g. `scale,drop` or `scale=0.5:2`; see
            `raymix.merging.search_space`.
        recipe: Says on what corpus, in what rows, and how many of them models are scored; on the
            domains of its section `specialists`, or on all.
        overrides: Changes to the merge file such as `parameters.drop=0.5`.
        trials: Points in all; left out, 11 for one option and 25 for more.
        workers: Points at once; left out, one per core or GPU, as memory allows.
        device: Where merges are computed, `cpu` or `cuda`; models are scored on a GPU where there
            is one.

    Raises:
        RaymixError: If something cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command goes on.
    """
    file = load_merge(source, overrides)
    place = OutputWorkspace(out).out
    one = _opened(file, place, search, recipe, trials, device)
    plan = plan_merge(file)
    with locked(one.folder, "search"):
        if not one.open():
            raise refuse_another(one.folder)
        machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
        trial_resources = _seats(plan, machine, workers, one.trials, on_gpu=device == "cuda")
        runner = _Runner(one, recipe.cluster, trial_resources)
        with ray_cluster(recipe.cluster):
            runner.run_rounds()
            points = one.points()
            best = best_of(points)["options"]
            test = runner.scores(_scored(one, plan, best, trial_resources.threads))
        document = _document(one, points, best, test)
        merged = merge(apply_point(file, best), place, device=device)
        document["merge"] = merged
        document["files"] = _write(document, one, best)
    return document


def _opened(
    file: MergeFile, out: Path, search: str, recipe: Recipe, trials: int | None, device: str
) -> Search:
    """Return the search; refuse what cannot work."""
    if writes_adapter(file):
        raise MergeError.at(
            "base_model",
            file.base_model,
            "a merge that gives an adapter has no loss of its own",
            fix="Name the base_model, and set output: model",
        )
    if trials is not None and trials < 1:
        raise RecipeError.at("--trials", trials, "too small", allowed="Allowed: 1 or more")
    space = search_space(file, search)
    apply_point(file, start_point(space))
    corpus = _corpus(recipe)
    held_out = HeldOut.of(recipe, corpus, _scored_domains(recipe, corpus))
    _refuse_misfit(file, recipe, corpus)
    count = trials or TRIALS.get(len(space), _MANY)
    folder = out.with_name(out.name + _SUFFIX)
    return Search(file, space, count, held_out, folder, device)


def _corpus(recipe: Recipe) -> Corpus:
    from raymix.corpus.open_or_prepare import open_or_prepare

    return open_or_prepare(recipe.corpus, lambda: None)


def _scored_domains(recipe: Recipe, corpus: Corpus) -> list[str]:
    """Return the domains of the recipe's section `specialists`, else all, that have held-out text.

    Raises:
        RecipeError: If there are none.
    """
    names = recipe.specialists.domains or corpus.domain_names
    found = [name for name in names if corpus.split(name, "valid").tokens]
    if not found:
        raise RecipeError.at(
            "--eval",
            corpus.path,
            "its corpus has no held-out text, so nothing can be chosen by it",
            fix="Give its domains `valid` files, or raise corpus.valid_fraction",
        )
    return found


def _refuse_misfit(file: MergeFile, recipe: Recipe, corpus: Corpus) -> None:
    """Raise RecipeError if the models cannot read the corpus' tokens."""
    models = plan_merge(file).models
    assert models is not None, "adapters alone were refused"
    info = corpus.manifest.tokenizer
    facts = CorpusFacts(info.vocab_size, info.eos_id, recipe.data.sequence_length)
    resolve_config(PretrainedModel(kind="pretrained", path=models.first.checkpoint.path), facts)


def _seats(
    plan: MergePlan, machine: Resources, workers: int | None, points: int, *, on_gpu: bool
) -> TrialResources:
    """Return how many points at once: one per core, fewer where memory holds fewer models."""
    entries = sum(place.n_bytes // place.dtype.itemsize for place in plan.layout.locations.values())
    largest = max(plan.job_bytes(job) for job in plan.choices)
    room = max(1, machine.memory_bytes // (_FP32_COPIES * 4 * entries + largest))
    one = ClusterConfig(workers=0, gpus_per_worker="auto" if on_gpu else 0)
    return divide_machine(
        machine, min(points, workers or room), one, oversubscribe=workers is not None
    )


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs pieces of the search on the cluster this process is joined to."""

    search: Search
    cluster: ClusterConfig
    trial_resources: TrialResources

    def run_rounds(self) -> None:
        """Try the points that were not tried, round by round.

        Raises:
            TrainingError: If a point could not be tried for another reason than the merge's own.
        """
        search = self.search
        while round_ := round_of(search, search.points()):
            left = [(n, point) for n, point in round_ if search.read(n) is None]
            done = round_[0][0] + len(round_) - len(left)
            print(
                f"points {round_[0][0] + 1} to {round_[-1][0] + 1} of {search.trials}, "
                f"{min(self.trial_resources.parallel, len(left))} at once, in {search.folder}",
                flush=True,
            )
            self._run(
                [PointTrial(search, n, point, self.trial_resources.threads) for n, point in left],
                done,
            )

    def scores(self, trials: Sequence[ScoreTrial]) -> dict[str, dict[str, float]]:
        """Return the losses on the test rows by name, having scored what was not scored."""
        self._run([trial for trial in trials if trial.result() is None], 0)
        return {trial.name: trial.result() or {} for trial in trials}

    def _run(self, pieces: Sequence[TrialTask], done: int) -> None:
        if not pieces:
            return
        outcome = run_trials(
            pieces,
            out=self.search.folder,
            trial_resources=self.trial_resources,
            cluster=self.cluster,
            done=done,
        )
        if outcome.problems:
            raise TrainingError(
                *(format_problem("--search", name, said) for name, said in outcome.problems.items())
            )


def _scored(
    search: Search, plan: MergePlan, best: Mapping[str, float], threads: int
) -> list[ScoreTrial]:
    """Return what is scored on the test rows: base, models, and the merges."""
    models = plan.models
    assert models is not None, "adapters alone were refused"
    whole = [model for model in models.unique() if model.adapter is None]
    found = [
        ScoreTrial(_name(at, model.label), search, threads, checkpoint=model.checkpoint.path)
        for at, model in enumerate(whole)
    ]
    found.append(ScoreTrial("as given", search, threads, point=start_point(search.space)))
    return [*found, ScoreTrial("chosen", search, threads, point=best)]


def _name(at: int, path: str) -> str:
    """Return a short name of a model, unlike the others' and good for a file."""
    parts = Path(path).parts[-3:]
    kept = [part for part in parts if not part.startswith(("checkpoints", "step-"))]
    return f"{at} {kept[-1] if kept else Path(path).name}"


def _document(
    search: Search,
    points: Sequence[Mapping[str, Any]],
    best: Mapping[str, float],
    test: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": search.file.merge_method,
        "search": {d.name: [d.low, d.high] for d in search.space},
        "trials": len(points),
        "held_out": search.held_out.document(),
        "points": list(points),
        "best": dict(best),
        "loss": {"as given": points[0]["loss"], "chosen": best_of(points)["loss"]},
        "test": {name: {"mean": mean_loss(told), "domains": told} for name, told in test.items()},
        "failed_points": sum(point["loss"] is None for point in points),
    }


def _write(document: Mapping[str, Any], search: Search, best: Mapping[str, float]) -> list[str]:
    """Return the files written: the result, the chosen merge file, and a picture."""
    folder = search.folder
    chosen = apply_point(search.file, best).model_dump(
        mode="json", exclude_unset=True, exclude_none=True
    )
    atomic_write_text(str(folder / "merge.yaml"), dump_yaml(chosen))
    text = json.dumps(document, ensure_ascii=False, indent=1)
    atomic_write_text(str(folder / "search_result.json"), text + "\n")
    written = [str(folder / name) for name in ("search_result.json", "merge.yaml")]
    if importlib.util.find_spec("matplotlib") is not None:
        from raymix.report.figures.merging import draw_search

        atomic_write_text(str(folder / "search.svg"), draw_search(document))
        written.append(str(folder / "search.svg"))
    return written
