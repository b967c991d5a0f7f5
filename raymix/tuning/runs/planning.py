"""Plan of a group of runs: resources of each run, preflight of every mixer, stage of each run.

Every mixer passes preflight before any run starts, and every error names its mixer.
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
from raymix.training.run.identity import differences, identity
from raymix.training.run.rundir import RunDirectory
from raymix.tuning.runs.variants import Variant

ERROR_LOG = "error.log"
"""File of a failed run's traceback, in its run directory."""

# Not part of a run's identity, but losses on different held-out rows cannot be compared.
_HELD_OUT_FIELD = "eval.rows_per_domain"
_UNLIMITED_RUNS = 10**9
# Ray counts fractional resources in ten-thousandths and rejects finer fractions.
_CPU_UNITS = 1e4
_MIN_CPUS = 0.01


@dataclass(frozen=True, slots=True)
class TrialResources:
    """Number of concurrent runs, and the resources of each."""

    parallel: int
    """Concurrent runs."""
    cpus: float
    """CPUs per run; a fraction where runs share cores."""
    gpus: int
    """GPUs per run, or per worker of a run: 0 or 1."""
    workers: int = 0
    """Ray Train workers per run; 0: a run is one process."""

    @property
    def threads(self) -> int:
        """Return the torch threads per process of a run."""
        return max(1, int(self.cpus / max(1, self.workers)))


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """Resources per run, and the plan of each mixer's runs."""

    trial_resources: TrialResources
    plans: Mapping[str, RunPlan]
    """By mixer."""


def plan_comparison(
    variants: Sequence[Variant],
    corpus: Corpus | None,
    machine: Resources,
    *,
    parallel: int | None,
    runs: int | None = None,
) -> ComparisonPlan:
    """Return the plan of all runs: by default one single-threaded run per core, or one per GPU.

    A small model gains little from a second thread. Where memory cannot hold a run per core, the
    number of concurrent runs is halved until it can.

    Args:
        variants: The runs.
        corpus: The prepared corpus, None where there is none yet.
        machine: The machine or cluster.
        parallel: Concurrent runs; None for as many as fit.
        runs: Total number of runs, where more variants will be added later.

    Raises:
        RecipeError: If a run cannot work, with one message per mixer and reason.
    """
    # Reversed, so that the first variant of each mixer is the one that stays.
    first_of_mixer = {variant.mixer: variant for variant in reversed(variants)}
    max_runs = min(runs or len(variants), parallel or _UNLIMITED_RUNS)
    # A number given by the user is taken as it is, even if runs then share cores.
    cluster, oversubscribe = variants[0].recipe.cluster, parallel is not None
    trial_resources = divide_machine(machine, max_runs, cluster, oversubscribe=oversubscribe)
    # The memory of a run depends on its micro-batch, which depends on its part of the memory, so
    # the number of runs cannot be computed directly. Halving needs few preflights.
    while (
        not oversubscribe
        and trial_resources.parallel > 1
        and not _fits(variants[0], corpus, machine, trial_resources)
    ):
        trial_resources = divide_machine(machine, trial_resources.parallel // 2, cluster)
    plans: dict[str, RunPlan] = {}
    problems: list[str] = []
    for label in dict.fromkeys(variant.mixer for variant in variants):
        try:
            plans[label] = preflight(
                first_of_mixer[label].recipe, corpus, trial_machine(machine, trial_resources)
            )
        except RaymixError as error:
            problems += [f"{label}: {message}" for message in error.problems]
    if problems:
        raise RecipeError(*_deduplicate(problems, list(first_of_mixer)))
    return ComparisonPlan(trial_resources, plans)


def divide_machine(
    machine: Resources, runs: int, cluster: ClusterConfig, *, oversubscribe: bool = False
) -> TrialResources:
    """Return the resources per run of up to `runs` concurrent runs, fewer where they do not fit.

    Args:
        machine: The machine or cluster.
        runs: Concurrent runs, at most.
        cluster: The workers of one run, and their resources.
        oversubscribe: Without GPUs, allow more single-process runs than cores.

    Raises:
        RecipeError: If the workers of a single run do not fit.
    """
    if cluster.workers:
        return _divide_for_workers(machine, runs, cluster)
    gpu = cluster.gpus_per_worker != 0 and machine.gpus >= 1
    capacity = int(machine.gpus) if gpu else (runs if oversubscribe else int(machine.cpus))
    parallel = max(1, min(runs, capacity))
    cpus_per_run = machine.cpus / parallel
    # One process cannot span nodes: a request above the CPUs of a node would wait forever.
    node_cpus = max(1.0, machine.cpus // machine.nodes)
    if cpus_per_run >= 1:
        cpus = min(float(int(cpus_per_run)), node_cpus)
    else:
        # Rounded down: rounded up, the last of the `parallel` runs would not fit.
        cpus = max(_MIN_CPUS, int(cpus_per_run * _CPU_UNITS) / _CPU_UNITS)
    return TrialResources(parallel, cpus, int(gpu))


def _divide_for_workers(machine: Resources, runs: int, cluster: ClusterConfig) -> TrialResources:
    """Return the resources of runs with Ray Train workers, which cannot oversubscribe cores."""
    workers, worker_cpus = cluster.workers, cluster.cpus_per_worker
    gpu = cluster.gpus_per_worker != 0 and machine.gpus >= workers
    # The quotient of two decimal fractions can fall just below a whole number.
    capacity = int(machine.cpus / (workers * worker_cpus) + 1e-9)
    capacity = min(capacity, int(machine.gpus // workers)) if gpu else capacity
    if capacity < 1:
        raise RecipeError.at(
            "cluster.workers_per_trial",
            workers,
            f"{workers} workers need {workers * worker_cpus:g} CPUs, "
            f"{machine.where} has {machine.cpus:g}",
            fix="Take fewer workers, or a larger cluster",
        )
    return TrialResources(max(1, min(runs, capacity)), workers * worker_cpus, int(gpu), workers)


def trial_machine(machine: Resources, trial_resources: TrialResources) -> Resources:
    """Return the part of the machine that one run gets."""
    return replace(
        machine,
        cpus=trial_resources.cpus,
        gpus=trial_resources.gpus * max(1, trial_resources.workers),
        memory_bytes=machine.memory_bytes // trial_resources.parallel,
        nodes=min(machine.nodes, max(1, trial_resources.workers)),
    )


def _fits(
    variant: Variant, corpus: Corpus | None, machine: Resources, trial_resources: TrialResources
) -> bool:
    """Return whether one run fits its part of the machine's memory."""
    share = trial_machine(machine, trial_resources)
    try:
        plan = preflight(variant.recipe, corpus, share)
    except RaymixError:
        # Preflight refuses a run that its part of the memory cannot hold; other faults are raised
        # by the caller's own preflight, with one run at once.
        return False
    # `memory_bytes` is then GPU memory, and runs do not share GPUs.
    return plan.on_gpu or plan.memory_bytes <= share.memory_bytes


def _deduplicate(problems: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the messages; one that all mixers share appears once, without a mixer's name."""
    bare = [message.partition(": ")[2] for message in problems]
    common = {message for message in bare if len(labels) > 1 and bare.count(message) == len(labels)}
    pairs = zip(problems, bare, strict=True)
    # A dict, not a set: messages stay in the order of the mixers.
    return list(dict.fromkeys(short if short in common else full for full, short in pairs))


RunStage = Literal["new", "begun", "done"]


def run_stages(
    variants: Sequence[Variant], corpus: Corpus, plans: Mapping[str, RunPlan]
) -> dict[str, RunStage]:
    """Return the stage of each run, by its name, as its directory shows it.

    Raises:
        RecipeError: If a directory holds a run that does not belong to this comparison.
    """
    stages: dict[str, RunStage] = {}
    problems: list[str] = []
    for variant in variants:
        try:
            steps = plans[variant.mixer].steps
            stages[variant.name] = _run_stage(variant, corpus, steps)
        except RaymixError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return stages


def _run_stage(variant: Variant, corpus: Corpus, steps: int) -> RunStage:
    run = RunDirectory(Path(variant.recipe.run_dir))
    names = os.listdir(run.path) if run.path.exists() else []
    # A run that failed before it began leaves a lock file and a traceback, but no recipe.
    if all(name.startswith(".") or name == ERROR_LOG for name in names):
        return "new"
    path, fix = str(run.path), "Give another --out, or remove the directory"
    if not run.resolved.is_file():
        raise RecipeError.at(variant.name, path, "the directory holds files but no run", fix=fix)
    differing = differences(_identity(run.recipe()), _identity(variant.recipe))
    if differing:
        raise RecipeError.at(
            variant.name,
            path,
            f"a run of another recipe is here; it differs in {'; '.join(differing)}",
            fix=fix,
        )
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        return "begun"
    if newest[1].corpus_fingerprint != corpus.fingerprint:
        raise RecipeError.at(
            variant.name, path, f"its corpus is not what {corpus.path} holds now", fix=fix
        )
    # `>=`: the same run may have been trained for more steps before.
    return "done" if newest[1].step >= steps else "begun"


def _identity(recipe: Recipe) -> dict[str, object]:
    return {
        **identity(recipe.model_dump(mode="json")),
        _HELD_OUT_FIELD: recipe.eval.rows_per_domain,
    }


def disk_problem(plan: RunPlan, runs: int) -> str | None:
    """Return the message of a disk too small for the checkpoints of `runs` runs, or None."""
    # One more than runs: a checkpoint is deleted only after the next one has been written.
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
