"""Groups of runs in one directory, for `compare`, `tune` and `specialists`: lock, run, read.

The run directories are the only state: a group is resumed by planning it again and running the
variants that are not done.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raymix.errors import RecipeError
from raymix.recipe import Recipe
from raymix.store import Corpus
from raymix.store.remote.errors import is_remote
from raymix.training.host.machine import Resources
from raymix.training.job import Job
from raymix.training.plan.runplan import RunPlan
from raymix.training.run.pinned_model import pin_model
from raymix.training.run.rundir import RunDirectory
from raymix.tuning.runs.planning import (
    ComparisonPlan,
    TrialResources,
    disk_problem,
    plan_comparison,
    run_stages,
)
from raymix.tuning.runs.results import RunResult, State, read_result
from raymix.tuning.runs.trial_task import RunTrial
from raymix.tuning.runs.trials import Outcome, run_trials
from raymix.tuning.runs.variants import Variant


@dataclass(frozen=True, slots=True)
class Group:
    """Variants of a recipe, their output directory, and the machine they run on."""

    recipe: Recipe
    variants: Sequence[Variant]
    out: Path
    machine: Resources
    parallel: int | None
    runs: int | None = None
    """Total number of runs, where more variants will be added later."""

    def plan(self, corpus: Corpus | None) -> ComparisonPlan:
        """Return the plan of all runs.

        Raises:
            RecipeError: If a run cannot work.
        """
        return plan_comparison(
            self.variants, corpus, self.machine, parallel=self.parallel, runs=self.runs
        )


def output_directory(out: str | os.PathLike[str] | None, recipe: Recipe, kind: str) -> Path:
    """Return the absolute directory of a group of runs; `NAME-KIND` beside the recipe's own run.

    Args:
        out: A directory in its place.
        recipe: The recipe, its paths resolved.
        kind: The kind of group.

    Raises:
        RecipeError: If it is a file, or the directory of a single run.
    """
    # Absolute: trials run in worker processes whose working directory is another.
    if out is None:
        # A single run may be stored at a URL; a group is in a directory of this machine.
        runs = "runs" if is_remote(recipe.run_dir) else os.path.dirname(recipe.run_dir)
        out = Path(runs) / f"{recipe.name}-{kind}"
    directory = Path(os.path.abspath(out))
    if directory.exists() and not directory.is_dir():
        raise RecipeError.at("--out", str(directory), "a file, not a directory")
    # A group inside a run would mix its files with the metrics and checkpoints of that run.
    if (directory / "resolved.yaml").exists():
        raise RecipeError.at(
            "--out", str(directory), "the directory of a single run", fix="Give another"
        )
    return directory


@contextmanager
def locked(out: Path, work: str) -> Iterator[None]:
    """Hold the lock of a group's directory; `work` names the kind of group in the error."""
    lock = RunDirectory(out).locked()
    # Entered by hand: an `except` around a `with` would also rename RecipeErrors of its body.
    try:
        lock.__enter__()
    except RecipeError as error:
        raise RecipeError.at(
            "--out", str(out), f"another {work} is running in it", fix="Wait for it, or stop it"
        ) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def make_runs(group: Group, plan: ComparisonPlan, corpus: Corpus) -> Outcome:
    """Start or resume the runs that are not done; return how they ended."""
    stages = run_stages(group.variants, corpus, plan.plans)
    remaining = [variant for variant in group.variants if stages[variant.name] != "done"]
    if not remaining:
        # Without this, a finished group would still start a Ray cluster.
        return Outcome()
    first_plan = plan.plans[remaining[0].mixer]
    refuse_full_disk(first_plan, len(remaining))
    # Names of Ray actors hold the session: a new one cannot meet actors of a run that was killed.
    session = uuid.uuid4().hex[:12]
    trials = [make_trial(v, plan.plans[v.mixer], plan.trial_resources, session) for v in remaining]
    steps = [plan.plans[variant.mixer].steps for variant in remaining]
    announce(
        first_plan,
        plan.trial_resources,
        total=len(group.variants),
        remaining=len(remaining),
        out=group.out,
        max_steps=max(steps),
    )
    return run_trials(
        trials,
        out=group.out,
        trial_resources=plan.trial_resources,
        cluster=group.recipe.cluster,
        done=len(group.variants) - len(remaining),
    )


def refuse_full_disk(plan: RunPlan, runs: int) -> None:
    """Raise RecipeError if the disk cannot hold the checkpoints of `runs` runs."""
    problem = disk_problem(plan, runs)
    if problem is not None:
        raise RecipeError(problem)


def announce(
    plan: RunPlan,
    trial_resources: TrialResources,
    *,
    total: int,
    remaining: int,
    out: Path,
    max_steps: int = 0,
) -> None:
    """Print the number and length of the runs; `max_steps` are the steps of the longest run."""
    # The joint run of `specialists` is longer than the others: one line gives the range.
    up_to = f" to {max_steps:,}" if max_steps > plan.steps else ""
    print(
        f"{total} runs of {plan.steps:,}{up_to} steps ({plan.tokens:,}"
        f"{f' to {max_steps * plan.tokens_per_step:,}' if up_to else ''} tokens), "
        f"{total - remaining} of them "
        f"finished before; {min(trial_resources.parallel, remaining)} at once, "
        f"{_resources_text(trial_resources)} each, "
        f"in {out}",
        flush=True,
    )


def _resources_text(trial_resources: TrialResources) -> str:
    """Return the resources of one run in words."""
    unit = (
        "a GPU"
        if trial_resources.gpus
        else f"{trial_resources.threads} thread" + "s" * (trial_resources.threads > 1)
    )
    if not trial_resources.workers:
        return unit
    return f"{trial_resources.workers} worker" + "s" * (trial_resources.workers > 1) + f" of {unit}"


def make_trial(
    variant: Variant, plan: RunPlan, trial_resources: TrialResources, session: str
) -> RunTrial:
    """Return the trial that trains a variant; it is pickled to the trial's process."""
    run = RunDirectory(Path(variant.recipe.run_dir))
    # Here and not in the trial's process: all trials of one call have one commit.
    job = Job(
        recipe=pin_model(variant.recipe, run),
        run=run,
        steps=plan.steps,
        micro_batch_rows=plan.micro_batch_rows,
        on_gpu=plan.on_gpu,
        threads=trial_resources.threads,
        session=session,
    )
    return RunTrial(variant.name, job, plan.parameters)


def read_results(
    group: Group, plan: ComparisonPlan, corpus: Corpus, outcome: Outcome
) -> list[RunResult]:
    """Return the result of every run; one that did not reach its last step is `failed`."""
    # Read from disk, not from `outcome`: it also covers the runs of earlier calls.
    stages = run_stages(group.variants, corpus, plan.plans)
    results: list[RunResult] = []
    for variant in group.variants:
        state: State = "done" if stages[variant.name] == "done" else "failed"
        problem = outcome.problems.get(variant.name, "it did not reach its last step")
        results.append(
            read_result(
                variant,
                state,
                flops_per_token=plan.plans[variant.mixer].flops_per_token,
                problem=problem if state == "failed" else None,
            )
        )
    return results
