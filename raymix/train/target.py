"""What `raymix eval` and `raymix export` are pointed at: a run, or one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raymix.errors import RecipeError, problem
from raymix.recipe import Recipe
from raymix.train.checkpoint import TrainingState, newest_checkpoint, read_state
from raymix.train.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint and what is known of it."""

    checkpoint: Path
    """Directory in Hugging Face format."""
    state: TrainingState | None
    """None for a directory that raymix did not write."""
    run: RunDirectory | None
    """The run it belongs to, if it lies in one."""

    def recipe(self, given: Recipe | None) -> Recipe:
        """Return `given`, or the recipe of the run.

        Raises:
            RecipeError: If neither is there.
        """
        if given is not None:
            return given
        if self.run is None:
            wrong = "the checkpoint lies in no run, so its recipe is not known"
            advice = "Name the recipe with --recipe"
            raise RecipeError(problem("checkpoint", str(self.checkpoint), wrong, advice))
        return self.run.recipe()


def find_target(path: str | Path) -> Target:
    """Return what lies at `path`: a run (its newest checkpoint) or a checkpoint.

    Raises:
        RecipeError: If it is neither, or a run without a whole checkpoint.
    """
    place = Path(path)
    run = RunDirectory(place)
    if run.resolved.is_file():
        found = newest_checkpoint(run.checkpoints)
        if found is None:
            wrong = "the run has no whole checkpoint yet"
            raise RecipeError(problem("run", str(path), wrong, "Train it first"))
        return Target(*found, run)
    if not (place / "config.json").is_file():
        wrong = "neither a run directory nor a checkpoint"
        if not place.exists():
            wrong = "no such directory"
        advice = "Name a directory that `raymix train` made, or one with a config.json"
        raise RecipeError(problem("run", str(path), wrong, advice))
    state = read_state(place) if (place / "state.json").is_file() else None
    above = RunDirectory(place.resolve().parent.parent)
    return Target(place, state, above if above.resolved.is_file() else None)
