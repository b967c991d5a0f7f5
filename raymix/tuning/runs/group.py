"""Runs of one recipe that are made side by side, for `compare` and `tune`: locked, made, read."""

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
from raymix.training.host.machine import Resources
from raymix.training.plan.runplan import RunPlan
from raymix.training.run.rundir import RunDirectory
from raymix.training.setup import Job
from raymix.tuning.runs.planning import (
    ComparisonPlan,
    TrialResources,
    disk_problem,
    find_runs,
    plan_comparison,
)
from raymix.tuning.runs.results import RunResult, State, read_result
from raymix.tuning.runs.trial_task import RunTrial
from raymix.tuning.runs.trials import Outcome, run_trials
from raymix.tuning.runs.variants import Variant


@dataclass(frozen=True, slots=True)
class Group:
    """What is run, and where."""

    recipe: Recipe
    variants: Sequence[Variant]
    out: Path
    has: Resources
    parallel: int | None
    runs: int | None = None
    """Runs in all, where more will follow."""

    def plan(self, corpus: Corpus | None) -> ComparisonPlan:
        """Return what every run would do.

        Raises:
            RecipeError: If a run cannot work.
        """
        return plan_comparison(
            self.variants, corpus, self.has, parallel=self.parallel, runs=self.runs
        )


def output_directory(out: str | os.PathLike[str] | None, default: str) -> Path:
    """Return the absolute directory of a group of runs; refuse what cannot be one."""
    directory = Path(os.path.abspath(out or Path("runs") / default))
    if directory.exists() and not directory.is_dir():
        raise RecipeError.at("--out", str(directory), "a file, not a directory")
    if (directory / "resolved.yaml").exists():
        raise RecipeError.at(
            "--out", str(directory), "the directory of a single run", fix="Give another"
        )
    return directory


@contextmanager
def locked(out: Path, what: str) -> Iterator[None]:
    """Hold the directory of a group for this process; `what` says what may be at work in it."""
    held = RunDirectory(out).locked()
    try:
        held.__enter__()
    except RecipeError as error:
        raise RecipeError.at(
            "--out", str(out), f"another {what} is at work in it", fix="Wait for it, or stop it"
        ) from error
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def make_runs(group: Group, plan: ComparisonPlan, corpus: Corpus) -> Outcome:
    """Return how the runs that were not finished ended, having made or continued them."""
    found = find_runs(group.variants, corpus, plan.plans)
    left = [variant for variant in group.variants if found[variant.name] != "done"]
    if not left:
        return Outcome()
    one = plan.plans[left[0].mixer]
    refuse_full_disk(one, len(left))
    session = uuid.uuid4().hex[:12]
    trials = [trial_of(v, plan.plans[v.mixer], plan.seats, session) for v in left]
    steps = [plan.plans[variant.mixer].steps for variant in left]
    announce(
        one, plan.seats, total=len(group.variants), left=len(left), out=group.out, most=max(steps)
    )
    return run_trials(
        trials,
        out=group.out,
        seats=plan.seats,
        cluster=group.recipe.cluster,
        done=len(group.variants) - len(left),
    )


def refuse_full_disk(plan: RunPlan, runs: int) -> None:
    """Raise RecipeError if the disk cannot hold the checkpoints of so many runs."""
    full = disk_problem(plan, runs)
    if full is not None:
        raise RecipeError(full)


def announce(
    plan: RunPlan, seats: TrialResources, *, total: int, left: int, out: Path, most: int = 0
) -> None:
    """Say what is about to run; `most` are the steps of the longest run."""
    up_to = f" to {most:,}" if most > plan.steps else ""
    print(
        f"{total} runs of {plan.steps:,}{up_to} steps ({plan.tokens:,}"
        f"{f' to {most * plan.tokens_per_step:,}' if up_to else ''} tokens), "
        f"{total - left} of them "
        f"finished before; {min(seats.parallel, left)} at once, "
        f"{_seat(seats)} each, "
        f"in {out}",
        flush=True,
    )


def _seat(seats: TrialResources) -> str:
    """Return in words what a run gets."""
    each = "a GPU" if seats.gpus else f"{seats.threads} thread" + "s" * (seats.threads > 1)
    if not seats.workers:
        return each
    return f"{seats.workers} worker" + "s" * (seats.workers > 1) + f" of {each}"


def trial_of(variant: Variant, planned: RunPlan, seats: TrialResources, session: str) -> RunTrial:
    """Return the run as Ray Tune is given it."""
    job = Job(
        recipe=variant.recipe,
        run=RunDirectory(Path(variant.recipe.run_dir)),
        steps=planned.steps,
        micro_batch_rows=planned.micro_batch_rows,
        on_gpu=planned.on_gpu,
        threads=seats.threads,
        session=session,
    )
    return RunTrial(variant.name, job, planned.parameters)


def read_results(
    group: Group, plan: ComparisonPlan, corpus: Corpus, outcome: Outcome
) -> list[RunResult]:
    """Return what every run came to; one that did not reach its end is `failed`, and says why."""
    found = find_runs(group.variants, corpus, plan.plans)
    results: list[RunResult] = []
    for variant in group.variants:
        ended: State = "done" if found[variant.name] == "done" else "failed"
        said = outcome.problems.get(variant.name, "it did not reach its last step")
        results.append(
            read_result(
                variant,
                ended,
                flops_per_token=plan.plans[variant.mixer].flops_per_token,
                problem=said if ended == "failed" else None,
            )
        )
    return results
