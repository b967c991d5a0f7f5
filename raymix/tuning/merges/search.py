"""`raymix merge --search`: numeric options of a merge (scale, drop rate, ...) by held-out loss.

Each point is a merge that is computed, scored on the search rows and deleted. The points of a round
run concurrently through Ray Tune, as many as cores and memory allow. Then the file's own merge, the
selected one, the base and the input models are scored on the test rows, which no selection has
used, and the selected merge is written. Points stay on disk beside the output, so the same command
resumes the search.
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
from raymix.merging.checkpoints.models import with_local_models, writes_adapter
from raymix.merging.checkpoints.output import OutputWorkspace
from raymix.merging.recipe import MergeFile, load_merge
from raymix.merging.run.engine import merge
from raymix.merging.run.plan import MergePlan, plan_merge
from raymix.merging.search_space import apply_point, search_space, start_point
from raymix.recipe import ClusterConfig, PretrainedModel, Recipe
from raymix.store import Corpus, atomic_write_text
from raymix.training.host.machine import Resources, resources
from raymix.training.launch.cluster import ray_cluster
from raymix.training.model.facts import CorpusFacts
from raymix.training.model.hf_model import resolve_config
from raymix.tuning.merges.scoring import HeldOut, Search, best_of, mean_loss, refuse_another
from raymix.tuning.merges.trials import PointTrial, ScoreTrial, round_of
from raymix.tuning.runs.group import locked
from raymix.tuning.runs.planning import TrialResources, divide_machine
from raymix.tuning.runs.trial_task import TrialTask
from raymix.tuning.runs.trials import run_trials

FORMAT = 1
TRIALS = {1: 11}
"""Default number of points, by number of options; `_DEFAULT_TRIALS` for two or more."""
_DEFAULT_TRIALS = 25
_SUFFIX = "-search"
# Memory of a point: the model in fp32, the logits of a few rows, the working set of the merge.
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
    """Search the options, write the selected merge to the new directory `out`, return the document.

    `OUT-search` gets a file per point, `merge.yaml` (the selected merge), `search_result.json` and,
    where matplotlib is installed, `search.svg`.

    Args:
        source: A merge file, its content, or a MergeFile; its own values are the first point.
        out: A directory that does not exist.
        search: Options to search, e.g. `scale,drop` or `scale=0.5:2`; see
            `raymix.merging.search_space`.
        recipe: Corpus, sequence length and number of rows for scoring; its domains are those of
            section `specialists`, or all.
        overrides: Changes to the merge file such as `parameters.drop=0.5`.
        trials: Number of points; None for 11 with one option and 25 with more.
        workers: Concurrent points; None for one per core or GPU, as memory allows.
        device: Device of the merges, `cpu` or `cuda`; models are scored on a GPU if there is one.

    Raises:
        RaymixError: If something cannot work; nothing has been started then.
        KeyboardInterrupt: After Ctrl-C; the same command resumes.
    """
    file = with_local_models(load_merge(source, overrides))
    # Refuses an `out` that exists, before an hour of search.
    target = OutputWorkspace(out).out
    job = _make_search(file, target, search, recipe, trials, device)
    plan = plan_merge(file)
    with locked(job.folder, "search"):
        if not job.open():
            raise refuse_another(job.folder)
        machine = resources(recipe.cluster.address, recipe.cluster.object_store_bytes)
        trial_resources = _trial_resources(
            plan, machine, workers, job.trials, on_gpu=device == "cuda"
        )
        runner = _Runner(job, recipe.cluster, trial_resources)
        # One cluster for all rounds: starting one takes seconds, as long as a small merge.
        with ray_cluster(recipe.cluster):
            runner.run_rounds()
            points = job.points()
            best = best_of(points)["options"]
            test = runner.scores(_test_trials(job, plan, best, trial_resources.threads))
        document = _document(job, points, best, test)
        # Computed again: the merges of the points were deleted, since each is a whole model.
        document["merge"] = merge(apply_point(file, best), target, device=device)
        document["files"] = _write(document, job, best)
    return document


def _make_search(
    file: MergeFile, out: Path, search: str, recipe: Recipe, trials: int | None, device: str
) -> Search:
    """Return the search, after all checks that need neither a lock nor a cluster."""
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
    # For its checks: a faulty merge file is refused here and not in every trial.
    apply_point(file, start_point(space))
    corpus = _corpus(recipe)
    held_out = HeldOut.of(recipe, corpus, _scored_domains(recipe, corpus))
    _refuse_misfit(file, recipe, corpus)
    count = trials or TRIALS.get(len(space), _DEFAULT_TRIALS)
    folder = out.with_name(out.name + _SUFFIX)
    return Search(file, space, count, held_out, folder, device)


def _corpus(recipe: Recipe) -> Corpus:
    from raymix.corpus.open_or_prepare import open_or_prepare

    return open_or_prepare(recipe.corpus, lambda: None, wait_minutes=recipe.cluster.wait_minutes)


def _scored_domains(recipe: Recipe, corpus: Corpus) -> list[str]:
    """Return the domains with held-out text among those of section `specialists`, else of all.

    Raises:
        RecipeError: If there are none.
    """
    names = recipe.specialists.domains or corpus.domain_names
    domains = [name for name in names if corpus.split(name, "valid").tokens]
    if not domains:
        raise RecipeError.at(
            "--eval",
            corpus.path,
            "its corpus has no held-out text, so nothing can be chosen by it",
            fix="Give its domains `valid` files, or raise corpus.valid_fraction",
        )
    return domains


def _refuse_misfit(file: MergeFile, recipe: Recipe, corpus: Corpus) -> None:
    """Raise RecipeError if the models do not fit the tokenizer or sequence length of the corpus."""
    models = plan_merge(file).models
    assert models is not None, "adapters alone were refused"
    info = corpus.manifest.tokenizer
    facts = CorpusFacts(info.vocab_size, info.eos_id, recipe.data.sequence_length)
    resolve_config(PretrainedModel(kind="pretrained", path=models.first.checkpoint.path), facts)


def _trial_resources(
    plan: MergePlan, machine: Resources, workers: int | None, points: int, *, on_gpu: bool
) -> TrialResources:
    """Return the resources per point: one point per core, fewer if memory holds fewer models."""
    # Scoring loads models in fp32, whatever the dtype on disk.
    parameters = sum(loc.n_bytes // loc.dtype.itemsize for loc in plan.layout.locations.values())
    largest = max(plan.job_bytes(job) for job in plan.choices)
    capacity = max(1, machine.memory_bytes // (_FP32_COPIES * 4 * parameters + largest))
    # Not the recipe's workers: a point is one process.
    cluster = ClusterConfig(workers=0, gpus_per_worker="auto" if on_gpu else 0)
    return divide_machine(
        machine, min(points, workers or capacity), cluster, oversubscribe=workers is not None
    )


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs tasks of the search on the Ray cluster of this process."""

    search: Search
    cluster: ClusterConfig
    trial_resources: TrialResources

    def run_rounds(self) -> None:
        """Evaluate the missing points, round by round.

        Raises:
            TrainingError: If a point failed for another reason than the merge itself.
        """
        search = self.search
        while round_ := round_of(search, search.points()):
            # A round that was interrupted is made up of the same points: files say which are left.
            remaining = [(n, point) for n, point in round_ if search.read(n) is None]
            done = round_[0][0] + len(round_) - len(remaining)
            print(
                f"points {round_[0][0] + 1} to {round_[-1][0] + 1} of {search.trials}, "
                f"{min(self.trial_resources.parallel, len(remaining))} at once, in {search.folder}",
                flush=True,
            )
            self._run(
                [
                    PointTrial(search, n, point, self.trial_resources.threads)
                    for n, point in remaining
                ],
                done,
            )

    def scores(self, trials: Sequence[ScoreTrial]) -> dict[str, dict[str, float]]:
        """Score the models that are not scored yet; return losses on the test rows, by name."""
        self._run([trial for trial in trials if trial.result() is None], 0)
        return {trial.name: trial.result() or {} for trial in trials}

    def _run(self, tasks: Sequence[TrialTask], done: int) -> None:
        if not tasks:
            return
        outcome = run_trials(
            tasks,
            out=self.search.folder,
            trial_resources=self.trial_resources,
            cluster=self.cluster,
            done=done,
        )
        if outcome.problems:
            raise TrainingError(
                *(
                    format_problem("--search", name, problem)
                    for name, problem in outcome.problems.items()
                )
            )


def _test_trials(
    search: Search, plan: MergePlan, best: Mapping[str, float], threads: int
) -> list[ScoreTrial]:
    """Return the trials on the test rows: base, input models, and the two merges."""
    models = plan.models
    assert models is not None, "adapters alone were refused"
    # An adapter alone is no model that could be scored.
    full_models = [model for model in models.unique() if model.adapter is None]
    trials = [
        ScoreTrial(
            _model_name(index, model.label), search, threads, checkpoint=model.checkpoint.path
        )
        for index, model in enumerate(full_models)
    ]
    trials.append(ScoreTrial("as given", search, threads, point=start_point(search.space)))
    return [*trials, ScoreTrial("chosen", search, threads, point=best)]


def _model_name(index: int, path: str) -> str:
    """Return a short name of a model, unique by its index and valid as a file name."""
    # Checkpoints of a run are RUN/checkpoints/step-N: the run is what tells models apart.
    parts = Path(path).parts[-3:]
    names = [part for part in parts if not part.startswith(("checkpoints", "step-"))]
    return f"{index} {names[-1] if names else Path(path).name}"


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
        "test": {
            name: {"mean": mean_loss(losses), "domains": losses} for name, losses in test.items()
        },
        "failed_points": sum(point["loss"] is None for point in points),
    }


def _write(document: Mapping[str, Any], search: Search, best: Mapping[str, float]) -> list[str]:
    """Write the result, the selected merge file and, with matplotlib, a figure; return paths."""
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
