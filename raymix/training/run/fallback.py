"""Falling back to earlier checkpoints without losing later ones.

Nothing is deleted: checkpoints that a run is not to go on from are moved to a folder beside the
others, and a run whose checkpoints are all gone is refused instead of begun again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raymix.errors import RecipeError
from raymix.store import atomic_write_text
from raymix.store.remote import files
from raymix.streaming.controller.journal import STATE
from raymix.training.run.checkpoint import (
    DamagedError,
    TrainingState,
    checkpoint_name,
    read_state,
)
from raymix.training.run.remote_run import (
    move_checkpoint,
    newest_checkpoint_of,
    whole_checkpoints_of,
)
from raymix.training.run.rundir import RunDirectory, read_metrics

_DAMAGED = "damaged"


def resume_checkpoint(
    run: RunDirectory, *, note: Callable[[str], None] | None = None
) -> tuple[Path, TrainingState] | None:
    """Return the checkpoint that a run goes on from; None for one that has not written any.

    Args:
        run: The run; its metrics are those of the local directory.
        note: Gets a line per damaged checkpoint.

    Raises:
        RecipeError: If its metrics tell of a checkpoint and there is none: begun again, the run
            would lose them and all its progress.
        StorageError: If a checkpoint cannot be read.
    """
    newest = newest_checkpoint_of(run, note=note)
    if newest is not None:
        return newest
    written = [line["step"] for line in read_metrics(run.metrics) if "checkpoint" in line]
    if not written:
        return None
    folder = files.join(run.where, run.checkpoints.name)
    raise RecipeError.at(
        "run.dir",
        run.where,
        f"it had a checkpoint at step {max(written):,}, and no whole one is left in {folder}",
        fix="Restore it there, or start afresh: raymix train RECIPE --if-exists new",
    )


def set_damaged_aside(run: RunDirectory, *, note: Callable[[str], None]) -> None:
    """Move damaged checkpoints to a folder of their own; `note` gets a line for each.

    Those of a run at a URL stay where they are, and are passed over.

    Raises:
        StorageError: If a checkpoint cannot be read.
    """
    if run.url is not None or not run.checkpoints.is_dir():
        return
    for path in sorted(run.checkpoints.glob("step-[0-9]*")):
        try:
            read_state(path)
        except DamagedError as error:
            note(f"{error} It is in {move_checkpoint(run, path.name, _DAMAGED)} now.")


def go_back(run: RunDirectory, step: int, *, note: Callable[[str], None]) -> None:
    """Make a run go on from its newest whole checkpoint at or before a step.

    Later checkpoints are moved to `checkpoints/after-step-XXXXXXXX`; entries of the mixture log and
    requests for shares that came after the checkpoint are dropped. The metrics are cut when the run
    starts.

    Args:
        run: The run; no other process may use it.
        step: The step.
        note: Gets a line per checkpoint that is moved.

    Raises:
        RecipeError: If there is no such checkpoint; nothing is changed.
        StorageError: If a checkpoint or the store cannot be read.
    """
    whole = list(whole_checkpoints_of(run, note=note))
    chosen = next((each for each in whole if each[1].step <= step), None)
    if chosen is None:
        steps = ", ".join(f"{state.step:,}" for _, state in reversed(whole))
        raise RecipeError.at(
            "from_step",
            step,
            f"the run in {run.where} has no whole checkpoint at or before it",
            allowed=f"It has those of steps {steps}" if steps else "It has none at all",
            fix="Use --if-exists new to train from the start",
        )
    state = chosen[1]
    later = [path.name for path, each in whole if each.step > state.step]
    if not later:
        return
    _cut_mixture_log(run, state)
    folder = f"after-{checkpoint_name(state.step)}"
    # The newest first: interrupted, the run goes on from the newest one left.
    for name in later:
        note(f"{name} is in {move_checkpoint(run, name, folder)} now.")


def _cut_mixture_log(run: RunDirectory, state: TrainingState) -> None:
    # Without the controller's state no request is taken over: one of them may be why to go back.
    (run.path / STATE).unlink(missing_ok=True)
    if state.controller is not None:
        lines = "".join(f"{line}\n" for line in state.controller["log"])
        atomic_write_text(str(run.mixture_log), lines)
    if run.url is not None:
        files.remove(files.join(run.url, STATE))
        run.mirror().send(run.mixture_log.name)
