"""What `raymix eval` and `raymix export` are pointed at: a run, or one checkpoint."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from raymix.errors import RecipeError
from raymix.recipe import Recipe
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote
from raymix.store.remote.mirror import download
from raymix.training.run.checkpoint import TrainingState, newest_checkpoint, read_state
from raymix.training.run.remote_run import (
    LOG_FILES,
    RECIPE_FILES,
    fetch_checkpoint,
    newest_checkpoint_of,
)
from raymix.training.run.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A checkpoint and what is known of it."""

    checkpoint: Path
    """Directory in Hugging Face format."""
    state: TrainingState | None
    """None for a directory that raymix did not write."""
    run: RunDirectory | None
    """The run it belongs to, if it lies in one."""
    where: str
    """The checkpoint's path or URL."""

    def recipe(self, given: Recipe | None) -> Recipe:
        """Return `given`, or the recipe of the run.

        Raises:
            RecipeError: If neither is there.
        """
        if given is not None:
            return given
        if self.run is None:
            raise RecipeError.at(
                "checkpoint",
                self.where,
                "the checkpoint lies in no run, so its recipe is not known",
                fix="Name the recipe with --recipe",
            )
        return self.run.recipe()


def find_checkpoint(path: str | Path) -> CheckpointRef:
    """Return what lies at `path`: a run (its newest checkpoint) or a checkpoint.

    Raises:
        RecipeError: If it is neither, or a run without a whole checkpoint.
        StorageError: If it is a URL and the store cannot be used.
    """
    if is_remote(str(path)):
        return _fetched(str(path).rstrip("/"))
    place = Path(path)
    run = RunDirectory(place)
    if run.resolved.is_file():
        found = newest_checkpoint(run.checkpoints)
        if found is None:
            raise _untrained(str(path))
        return CheckpointRef(*found, run, str(found[0]))
    if not (place / "config.json").is_file():
        raise _neither(str(path), there=place.exists())
    state = read_state(place) if (place / "state.json").is_file() else None
    above = RunDirectory(place.resolve().parent.parent)
    return CheckpointRef(place, state, above if above.resolved.is_file() else None, str(place))


def _fetched(url: str) -> CheckpointRef:
    """Return what lies at a URL, its files fetched to a directory that ends with this process."""
    files.check_store(url, "run")
    here = Path(tempfile.mkdtemp(prefix="raymix-"))
    atexit.register(shutil.rmtree, here, ignore_errors=True)
    names = files.list_directory(url)
    if "config.json" in names:
        return _fetched_checkpoint(url, names, here)
    run = RunDirectory(here / url.rsplit("/", 1)[-1], url)
    run.mirror().fetch(*RECIPE_FILES, *LOG_FILES)
    if not run.resolved.is_file():
        raise _neither(url, there=bool(names))
    found = newest_checkpoint_of(run)
    if found is None:
        raise _untrained(url)
    path = fetch_checkpoint(run, found[0])
    return CheckpointRef(path, found[1], run, files.join(url, "checkpoints", path.name))


def _fetched_checkpoint(url: str, names: list[str], here: Path) -> CheckpointRef:
    place = here / url.rsplit("/", 1)[-1]
    place.mkdir()
    for name in names:
        download(files.join(url, name), place / name)
    state = read_state(place) if "state.json" in names else None
    above = url.rsplit("/", 2)[0]
    run = RunDirectory(here / above.rsplit("/", 1)[-1], above)
    run.mirror().fetch(*RECIPE_FILES, *LOG_FILES)
    return CheckpointRef(place, state, run if run.resolved.is_file() else None, url)


def _untrained(place: str) -> RecipeError:
    return RecipeError.at("run", place, "the run has no whole checkpoint yet", fix="Train it first")


def _neither(place: str, *, there: bool) -> RecipeError:
    return RecipeError.at(
        "run",
        place,
        "neither a run directory nor a checkpoint" if there else "no such directory",
        fix="Name a directory that `raymix train` made, or one with a config.json",
    )
