"""Extension of a run: more steps than it was asked for, with the batches that it would have had.

The data of a step is a function of the step, so nothing of what was read changes. The learning rate
is one of the step and the length: its schedule has another shape, which is stated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raymix.errors import RecipeError
from raymix.mixers import MixerContext, PlannedMixer, build_mixer
from raymix.recipe import Recipe
from raymix.training.model.learning_rate import decay_steps, learning_rate
from raymix.training.run.checkpoint import checkpoint_name
from raymix.training.run.rundir import RunDirectory

_SET_ASIDE = "before-extension"


def check_longer(recipe: Recipe, steps: int, before: int, done: int) -> None:
    """Check that a run becomes longer.

    Args:
        recipe: The recipe with the new length.
        steps: Its steps.
        before: Steps that the run was asked for.
        done: Steps that the newest checkpoint has.

    Raises:
        RecipeError: If it does not.
    """
    if steps >= max(before, done):
        return
    field = "steps" if recipe.train.steps else "tokens"
    raise RecipeError.at(
        f"train.{field}",
        getattr(recipe.train, field),
        f"{steps:,} steps, and the run has {before:,}, of which {done:,} are done",
        allowed="Allowed with --extend: more",
        fix="Raise it, or use --if-exists new",
    )


def check_shares(recipe: Recipe, before: MixerContext, after: MixerContext, done: int) -> None:
    """Check that the shares of the steps that are done do not depend on the run's length.

    Args:
        recipe: The recipe.
        before: The run as its mixer saw it.
        after: The same with the new length.
        done: Steps that are done.

    Raises:
        RecipeError: If they do: the run would not be the one that had been asked for at first.
    """
    old, new = build_mixer(recipe.mixer, before), build_mixer(recipe.mixer, after)
    # An adaptive mixer goes on from its state.
    if not isinstance(old, PlannedMixer) or not isinstance(new, PlannedMixer):
        return
    # Between boundaries shares are constant or on a line.
    edges = {0, *old.boundaries, *new.boundaries}
    steps = sorted({near for edge in edges for near in (edge - 1, edge) if 0 <= near < done})
    if all(np.allclose(old.planned(step), new.planned(step), atol=1e-12) for step in steps):
        return
    raise RecipeError.at(
        "mixer.kind",
        recipe.mixer.kind,
        "its shares depend on the length of the run, so those of a longer one are others from the "
        "first step on",
        fix="Use --if-exists new, or a mixer of fixed shares",
    )


def schedule_notes(recipe: Recipe, before: int, steps: int, step: int) -> Iterator[str]:
    """Yield lines on the learning rate of a run that goes on from `step` with another length."""
    train = recipe.train
    old, new = (
        learning_rate(min(step, total - 1), steps=total, config=train) for total in (before, steps)
    )
    yield (
        f"extended from {before:,} to {steps:,} steps: from step {step:,} on the learning rate is "
        f"{new:.3g}, where the run of {before:,} had {old:.3g}; it ends at "
        f"{learning_rate(steps - 1, steps=steps, config=train):.3g}"
    )
    if new > 1.01 * old and train.schedule == "wsd":
        yield (
            f"no checkpoint from before the decay at step {before - decay_steps(before, train):,} "
            "is left to go on from; train.keep_checkpoints keeps more"
        )


def set_decay_aside(run: RunDirectory, recipe: Recipe, before: int) -> str | None:
    """Move the checkpoints of a decay away, so that `wsd` goes on from its hold.

    They stay in the run's directory. Does nothing for another schedule, in a bucket, or where no
    checkpoint from before the decay is left.

    Args:
        run: The run.
        recipe: Its recipe.
        before: Steps that it was asked for.

    Returns:
        A line that says so, or None.
    """
    if recipe.train.schedule != "wsd" or run.url is not None or not run.checkpoints.is_dir():
        return None
    hold = before - decay_steps(before, recipe.train)
    names = sorted(path.name for path in run.checkpoints.glob("step-*"))
    decayed = [name for name in names if name > checkpoint_name(hold)]
    if not decayed or len(decayed) == len(names):
        return None
    aside: Path = run.checkpoints / _SET_ASIDE
    aside.mkdir(exist_ok=True)
    # The newest first: an interruption leaves a run that was stopped in its decay.
    for name in reversed(decayed):
        os.replace(run.checkpoints / name, aside / name)
    step = int(names[-len(decayed) - 1].removeprefix("step-"))
    return (
        f"wsd goes on from its hold, at step {step:,}; the checkpoints of the decay are in {aside}"
    )
