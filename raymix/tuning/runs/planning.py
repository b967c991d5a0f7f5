"""What a comparison would do: how many runs at once, and a refusal of what cannot work.

Every mixer is planned before anything starts, and every fault names the mixer it is of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from raymix.errors import RaymixError, RecipeError, format_problem
from raymix.recipe import ClusterConfig, Recipe
from raymix.store import Corpus
from raymix.training.host.machine import Resources
from raymix.training.plan.preflight import preflight
from raymix.training.plan.runplan import RunPlan
from raymix.training.run.checkpoint import newest_checkpoint
from raymix.training.run.rundir import RunDirectory, differences, identity
from raymix.tuning.runs.variants import Variant

ERROR_LOG = "error.log"
"""Where a failed run's traceback is, in its directory."""

# Not part of what a run is, but losses on other held-out rows cannot be compared.
_SCORED_ON = "eval.rows_per_domain"


@dataclass(frozen=True, slots=True)
class TrialResources:
    """How the machine is shared between runs."""

    parallel: int
    """Runs at once."""
    cpus: float
    """CPUs of each."""
    gpus: int
    """GPUs of each, or of each of its workers: 0 or 1."""
    workers: int = 0
    """Workers of each, which Ray Train seats; 0: a run is one process."""

    @property
    def threads(self) -> int:
        """Return the threads of a run."""
        return max(1, int(self.cpus / max(1, self.workers)))


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What every run would do, and on what."""

    seats: TrialResources
    plans: Mapping[str, RunPlan]
    """By mixer."""


def plan_comparison(
    variants: Sequence[Variant],
    corpus: Corpus | None,
    has: Resources,
    *,
    parallel: int | None,
    runs: int | None = None,
) -> ComparisonPlan:
    """Return the plan of all runs; runs of one thread side by side, as many as fit.

    A small model gains little from a second thread, so by default every core gets a run of its
    own, fewer where that is more than memory holds; a GPU gets one run.

    Args:
        variants: The runs.
        corpus: The prepared corpus, None where there is none yet.
        has: The machine or cluster.
        parallel: Runs at once; left out, as many as fit.
        runs: Runs in all, where more will follow.

    Raises:
        RecipeError: If a run cannot work, with one message per mixer and reason.
    """
    firsts = {variant.mixer: variant for variant in reversed(variants)}
    most = min(runs or len(variants), parallel or 10**9)
    cluster, crowded = variants[0].recipe.cluster, parallel is not None
    seats = share_out(has, most, cluster, crowded=crowded)
    while not crowded and seats.parallel > 1 and not _fits(variants[0], corpus, has, seats):
        seats = share_out(has, seats.parallel // 2, cluster)
    plans: dict[str, RunPlan] = {}
    problems: list[str] = []
    for label in dict.fromkeys(variant.mixer for variant in variants):
        try:
            plans[label] = preflight(firsts[label].recipe, corpus, part(has, seats))
        except RaymixError as error:
            problems += [f"{label}: {message}" for message in error.problems]
    if problems:
        raise RecipeError(*_said_once(problems, list(firsts)))
    return ComparisonPlan(seats, plans)


def share_out(
    has: Resources, runs: int, cluster: ClusterConfig, *, crowded: bool = False
) -> TrialResources:
    """Return how `runs` runs, or as many as there is room for, share the machine.

    Args:
        has: The machine or cluster.
        runs: Runs wanted at once.
        cluster: Of a run: its workers, and what they need.
        crowded: Without GPUs, more runs of one process than cores are allowed: they share cores.

    Raises:
        RecipeError: If there is no room for the workers of one run.
    """
    if cluster.workers:
        return _share_out_workers(has, runs, cluster)
    gpu = cluster.gpus_per_worker != 0 and has.gpus >= 1
    room = int(has.gpus) if gpu else (runs if crowded else int(has.cpus))
    parallel = max(1, min(runs, room))
    each = has.cpus / parallel
    node = max(1.0, has.cpus // has.nodes)
    # Ray hands out CPUs in ten-thousandths.
    cpus = min(float(int(each)), node) if each >= 1 else max(0.01, int(each * 1e4) / 1e4)
    return TrialResources(parallel, cpus, int(gpu))


def _share_out_workers(has: Resources, runs: int, cluster: ClusterConfig) -> TrialResources:
    """Return the seats of runs whose workers Ray Train places: these cannot share cores."""
    workers, each = cluster.workers, cluster.cpus_per_worker
    gpu = cluster.gpus_per_worker != 0 and has.gpus >= workers
    room = int(has.cpus / (workers * each) + 1e-9)
    room = min(room, int(has.gpus // workers)) if gpu else room
    if room < 1:
        raise RecipeError.at(
            "cluster.workers_per_trial",
            workers,
            f"{workers} workers need {workers * each:g} CPUs, {has.where} has {has.cpus:g}",
            fix="Take fewer workers, or a larger cluster",
        )
    return TrialResources(max(1, min(runs, room)), workers * each, int(gpu), workers)


def part(has: Resources, seats: TrialResources) -> Resources:
    """Return what one run has of the machine."""
    return replace(
        has,
        cpus=seats.cpus,
        gpus=seats.gpus * max(1, seats.workers),
        memory_bytes=has.memory_bytes // seats.parallel,
        nodes=min(has.nodes, max(1, seats.workers)),
    )


def _fits(variant: Variant, corpus: Corpus | None, has: Resources, seats: TrialResources) -> bool:
    share = part(has, seats)
    try:
        plan = preflight(variant.recipe, corpus, share)
    except RaymixError:
        return False
    # On a GPU, memory is that of the GPU, which runs do not share.
    return plan.on_gpu or plan.memory_bytes <= share.memory_bytes


def _said_once(problems: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the messages, those that every mixer has in common once and without its name."""
    bare = [text.partition(": ")[2] for text in problems]
    common = {text for text in bare if len(labels) > 1 and bare.count(text) == len(labels)}
    kept = (text if said not in common else said for text, said in zip(problems, bare, strict=True))
    return list(dict.fromkeys(kept))


Found = Literal["new", "begun", "done"]


def find_runs(
    variants: Sequence[Variant], corpus: Corpus, plans: Mapping[str, RunPlan]
) -> dict[str, Found]:
    """Return how far each run has come, by its name.

    Raises:
        RecipeError: If a directory holds a run that does not belong to this comparison.
    """
    found: dict[str, Found] = {}
    problems: list[str] = []
    for variant in variants:
        try:
            steps = plans[variant.mixer].steps
            found[variant.name] = _found(variant, corpus, steps)
        except RaymixError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return found


def _found(variant: Variant, corpus: Corpus, steps: int) -> Found:
    run = RunDirectory(Path(variant.recipe.run_dir))
    inside = os.listdir(run.path) if run.path.exists() else []
    # A run that failed before it began leaves no more than this.
    if all(name.startswith(".") or name == ERROR_LOG for name in inside):
        return "new"
    where, advice = str(run.path), "Give another --out, or remove the directory"
    if not run.resolved.is_file():
        raise RecipeError.at(
            variant.name, where, "the directory holds files but no run", fix=advice
        )
    differing = differences(_identity(run.recipe()), _identity(variant.recipe))
    if differing:
        raise RecipeError.at(
            variant.name,
            where,
            f"a run of another recipe is here; it differs in {'; '.join(differing)}",
            fix=advice,
        )
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        return "begun"
    if newest[1].corpus_fingerprint != corpus.fingerprint:
        raise RecipeError.at(
            variant.name, where, f"its corpus is not what {corpus.path} holds now", fix=advice
        )
    return "done" if newest[1].step >= steps else "begun"


def _identity(recipe: Recipe) -> dict[str, object]:
    return {**identity(recipe.model_dump(mode="json")), _SCORED_ON: recipe.eval.rows_per_domain}


def disk_problem(plan: RunPlan, runs: int) -> str | None:
    """Return why the disk cannot hold the checkpoints of so many runs, if so."""
    # While a checkpoint is written the one before it is still there.
    needed = (runs + 1) * plan.checkpoint_bytes
    if plan.disk_free is None or needed <= plan.disk_free:
        return None
    return format_problem(
        "--out",
        str(Path(plan.run_dir).parent),
        (
            f"{runs} runs leave about {needed / 1e9:.3g} GB of checkpoints, "
            f"{plan.disk_free / 1e9:.3g} GB are free"
        ),
        fix="Free space, or give another",
    )
