"""`raymix.train`: from a recipe to a run directory with checkpoints, metrics and a report.

In order: load the recipe, open the run directory, prepare the corpus if needed, run the preflight
checks, train (in this process or on Ray), summarize, draw the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from contextlib import suppress
from functools import partial
from typing import Any

from rich.console import Console

from raymix._utils.imports import import_modules
from raymix._utils.json import parse_json
from raymix._utils.stages import stage
from raymix.errors import CorpusError, RecipeError, StorageError
from raymix.mixers import build_mixer
from raymix.recipe import PretrainedModel, Recipe, load_recipe
from raymix.store import Corpus, atomic_write_text
from raymix.store.remote import files
from raymix.store.remote.hub import fetch_model
from raymix.training.host.environment import environment
from raymix.training.host.machine import requested_threads
from raymix.training.job import Job
from raymix.training.launch.cluster import (
    check_private_cluster,
    keep_freed_memory,
    ray_cluster,
    redirect_ray_output,
)
from raymix.training.launch.placement import worker_resources
from raymix.training.launch.preload import PRELOAD
from raymix.training.launch.watch import watch
from raymix.training.plan.cluster_resources import run_resources, wait_for_workers
from raymix.training.plan.mixer_context import count_steps, mixer_context
from raymix.training.plan.preflight import preflight
from raymix.training.plan.runplan import RunPlan
from raymix.training.run.domain_change import (
    FREE_FIELDS,
    change_notes,
    check_change,
    domain_change,
    shares_before,
    with_inherited_shares,
)
from raymix.training.run.extension import (
    check_longer,
    check_shares,
    schedule_notes,
    set_decay_aside,
)
from raymix.training.run.fallback import go_back, resume_checkpoint, set_damaged_aside
from raymix.training.run.heartbeat_lock import run_lock
from raymix.training.run.identity import LENGTH_FIELDS
from raymix.training.run.pinned_model import pin_model, pretrained_repo
from raymix.training.run.progress import RunProgress
from raymix.training.run.remote_run import (
    LOG_FILES,
    RECIPE_FILES,
    STOP_FILE,
    WORKER_FILES,
    RunSync,
    newest_checkpoint_of,
    remove_working_copy,
)
from raymix.training.run.rundir import (
    IfExists,
    RunDirectory,
    open_run,
    stored_recipe,
)
from raymix.training.summary import print_summary, summary


def train(
    recipe: Recipe | str | os.PathLike[str],
    *,
    if_exists: IfExists = "resume",
    extend: bool = False,
    domains_from: int | None = None,
    from_step: int | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Train a recipe and return the run's summary; prints progress on stdout.

    Prepares the corpus if that has not been done, resumes from the newest checkpoint if there is
    one, and leaves a finished run alone.

    Args:
        recipe: The recipe, or the path of one.
        if_exists: For an existing run directory: `resume` continues a run of the same recipe,
            `fail` refuses, `new` takes a fresh directory beside it.
        extend: Make a run that is there longer: `train.steps` (or `tokens`) may be larger than its
            own, and it goes on with the batches that it would have had; only the schedule of the
            learning rate has another shape, which is printed.
        domains_from: Go on with other domains than the run has read, from this step on, which must
            be that of its newest checkpoint: those of the recipe, whose mixer may be another, too.
            Stated again once the run has gone on, it changes nothing.
        from_step: Go back to the newest whole checkpoint at or before this step. Later ones are
            moved aside; metrics and mixture log end there.
        report: Draw `report.html` at the end, if matplotlib is installed.

    Raises:
        RaymixError: If the run cannot work, or the work failed.
        KeyboardInterrupt: After Ctrl-C; the run can be resumed.
    """
    from raymix.corpus.open_or_prepare import open_or_prepare

    if domains_from is not None and from_step is not None:
        raise RecipeError.at(
            "from-step",
            from_step,
            "not together with --domains-from, which goes on from the newest checkpoint",
            fix="Move the later checkpoints out of the run's directory checkpoints first",
        )
    loaded = load_recipe(recipe)
    stage("checking recipe, corpus and machine")
    lengths = LENGTH_FIELDS if extend else frozenset[str]()
    may_differ = lengths if domains_from is None else lengths | FREE_FIELDS
    run = open_run(loaded, if_exists, may_differ=may_differ)
    # What the Hub lacks is a problem of the plan, which names all of them.
    with suppress(StorageError):
        loaded = pin_model(loaded, run)
    available = run_resources(loaded)
    corpus = open_or_prepare(
        loaded.corpus,
        lambda: preflight(loaded, None, available),
        wait_minutes=loaded.cluster.wait_minutes,
    )
    if domains_from is not None:
        loaded = _from_step(run, loaded, corpus, domains_from, may_differ=lengths)
    plan = preflight(loaded, corpus, available)
    with run_lock(run, note=_say):
        if run.url is not None:
            run.mirror().fetch(*RECIPE_FILES, *LOG_FILES)
        set_damaged_aside(run, note=_say)
        if from_step is not None:
            go_back(run, from_step, note=_say)
        if extend:
            _extend(run, loaded, corpus, plan.steps)
        if not _finished(run, plan.steps, corpus, loaded, domains_from=domains_from):
            for line in plan.notes:
                if line.startswith(("model: ", "cluster: ")):
                    _say(line)
            _fetch_model(loaded, run)
            _write_run(run, loaded, plan)
            _train(loaded, run, plan, domains_from)
    document = summary(run)
    _show(run, document, report=report)
    remove_working_copy(run)
    return document


def _extend(run: RunDirectory, recipe: Recipe, corpus: Corpus, steps: int) -> None:
    """Check that a run can be made longer, and say what changes.

    Raises:
        RecipeError: If it cannot.
    """
    newest = newest_checkpoint_of(run, note=_say)
    if newest is None:
        return
    before = count_steps(stored_recipe(run))
    done = newest[1].step
    check_longer(recipe, steps, before, done)
    if steps == before:
        return
    contexts = [mixer_context(recipe, corpus, steps=each) for each in (before, steps)]
    check_shares(recipe, contexts[0], contexts[1], done)
    if (line := set_decay_aside(run, recipe, before)) is not None:
        _say(line)
        newest = newest_checkpoint_of(run, note=_say)
        done = newest[1].step if newest else 0
    for line in schedule_notes(recipe, before, steps, done):
        _say(line)


def _from_step(
    run: RunDirectory, recipe: Recipe, corpus: Corpus, step: int, *, may_differ: frozenset[str]
) -> Recipe:
    """Return the recipe with the shares that its domains have from a step of the run on.

    Raises:
        RecipeError: If there is no run, or its domains did not change at that step.
        CorpusError: If the content of domains that stay is another.
    """
    newest = newest_checkpoint_of(run, note=_say)
    if newest is None:
        raise RecipeError.at(
            "domains-from",
            step,
            f"no run with a checkpoint is in {run.where} to go on from",
            fix="Leave it out, or give the run.dir of a run",
        )
    state = newest[1]
    change = domain_change(state, corpus)
    if change is not None:
        check_change(change, state, corpus, asked=step, recipe=recipe, where=run.where)
    resolved = with_inherited_shares(recipe, corpus, shares_before(state, step))
    if change is None:
        # The run has gone on with these domains: what is asked for must be what it has.
        open_run(resolved, "resume", may_differ=may_differ)
    return resolved


def _finished(
    run: RunDirectory, steps: int, corpus: Corpus, recipe: Recipe, *, domains_from: int | None
) -> bool:
    """Return whether the run has a checkpoint of its last step; raise for a changed corpus.

    Raises:
        CorpusError: If the run's checkpoint was made with another corpus, and that is not accepted,
            or the run is finished, or the domains are others.
        RecipeError: If the run has lost its checkpoints.
    """
    newest = resume_checkpoint(run, note=_say)
    if newest is None:
        return False
    state = newest[1]
    if (change := domain_change(state, corpus)) is not None:
        check_change(change, state, corpus, asked=domains_from, recipe=recipe, where=run.where)
        if state.step >= steps:
            raise RecipeError.at(
                "domains-from",
                domains_from,
                f"the run in {run.where} is finished: no step is left for other domains",
                fix="Add --extend, and raise train.steps",
            )
        mixer = build_mixer(recipe.mixer, mixer_context(recipe, corpus, steps=steps))
        for line in change_notes(change, mixer, state):
            _say(line)
    elif state.corpus_fingerprint != corpus.fingerprint and state.step >= steps:
        raise CorpusError.at(
            "corpus.path",
            recipe.corpus.path,
            f"its content is not what the run in {run.where} was trained on, which is finished",
            fix="Use --if-exists new to train on it, or restore the corpus",
        )
    elif state.corpus_fingerprint != corpus.fingerprint and not recipe.data.accept_changed_corpus:
        raise CorpusError.at(
            "corpus.path",
            recipe.corpus.path,
            f"its content is not that of the checkpoint at step {state.step:,}",
            fix="Restore the corpus, set data.accept_changed_corpus, or use --if-exists new",
        )
    if state.step < steps:
        _say(f"going on from step {state.step:,} of {steps:,} in {run.where}")
        return False
    _say(f"the run in {run.where} is finished; --if-exists new would train afresh")
    return True


def _fetch_model(recipe: Recipe, run: RunDirectory) -> None:
    """Download the model's weights if they are on the Hub; a run that goes on has its own."""
    repo = pretrained_repo(recipe.model) if isinstance(recipe.model, PretrainedModel) else None
    if repo is not None and newest_checkpoint_of(run) is None:
        fetch_model(repo)


def _write_run(run: RunDirectory, recipe: Recipe, plan: RunPlan) -> None:
    run.write_recipe(recipe)
    for leftover in (run.stop_request, run.stages):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(run.stalls, ignore_errors=True)
    about = environment(
        steps=plan.steps,
        parameters=plan.parameters,
        workers=plan.workers,
        tracking_id=_tracking_id(run) or uuid.uuid4().hex,
    )
    atomic_write_text(str(run.path / "environment.json"), json.dumps(about, indent=1))
    if run.url is not None:
        files.remove(files.join(run.url, STOP_FILE))
        run.mirror().send(*RECIPE_FILES)


def _tracking_id(run: RunDirectory) -> str:
    """Return the run's id in trackers, empty if it has not been started before."""
    with suppress(OSError, ValueError, AttributeError):
        about = parse_json((run.path / "environment.json").read_text("utf-8"))
        return str(about.get("tracking_id", ""))
    return ""


def _train(recipe: Recipe, run: RunDirectory, plan: RunPlan, domains_from: int | None) -> None:
    job = Job(
        recipe=recipe,
        run=run,
        steps=plan.steps,
        micro_batch_rows=plan.micro_batch_rows,
        on_gpu=plan.on_gpu,
        threads=requested_threads(),
        session=uuid.uuid4().hex[:12],
        tracking_id=_tracking_id(run),
        domains_from=domains_from,
    )
    with (
        redirect_ray_output(run.path / "ray.log"),
        RunProgress(run.metrics, steps=plan.steps) as progress,
        _run_sync(run, on_ray=recipe.cluster.workers > 0) as sync,
    ):
        if recipe.cluster.workers:
            progress.waiting("starting or joining Ray")
            stage("starting or joining Ray")
            with ray_cluster(recipe.cluster):
                from raymix.training.launch.driver import run_on_ray

                # Here, not before the corpus is prepared: nodes without work are removed again.
                wait_for_workers(
                    recipe.cluster,
                    worker_resources(recipe.cluster, on_gpu=job.on_gpu),
                    progress.say,
                )
                starting = f"{recipe.cluster.workers} workers"
                stage(f"starting {starting}")
                watched = partial(watch, run=run, progress=progress, starting=starting)
                watched = partial(watched, check=check_private_cluster, refresh=sync.refresh)
                run_on_ray(job, watched)
        else:
            import_modules(PRELOAD.modules)
            from raymix.training.launch.local import run_in_process

            if not job.on_gpu:
                keep_freed_memory()
            work = partial(run_in_process, job, stop_requested=run.stop_request.exists)
            watch(work, run, progress, starting="the model")
    newest = newest_checkpoint_of(run)
    done = newest[1].step if newest else 0
    if done < plan.steps:
        _say(f"stopped at step {done:,} of {plan.steps:,}; the same command goes on from there")
        raise KeyboardInterrupt


def _run_sync(run: RunDirectory, *, on_ray: bool) -> RunSync:
    """Return the sync of a run at a URL: sends what this process writes, fetches the rest."""
    written = [*LOG_FILES, "tensorboard", "error.log"]
    if not on_ray:
        return RunSync(run, send=written)
    # On Ray the first worker writes the metrics, maybe on another machine.
    by_driver = [name for name in written if name not in WORKER_FILES]
    return RunSync(run, send=[*by_driver, STOP_FILE], fetch=WORKER_FILES)


def _show(run: RunDirectory, document: dict[str, Any], *, report: bool) -> None:
    """Print the table of domains, and draw the report if matplotlib is installed."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    _say("")
    print_summary(document, console)
    if not report:
        return
    if importlib.util.find_spec("matplotlib") is None:
        _say("no report.html: matplotlib is not installed (pip install 'raymix[plots]')")
        return
    from raymix.report import write_report

    page = write_report([run.where], run.path / "report.html")
    if run.url is not None:
        run.mirror().send(page.name, page.with_suffix(".json").name)
    _say(f"report: {files.join(run.where, page.name)}")


def _say(text: str) -> None:
    print(text, flush=True)
