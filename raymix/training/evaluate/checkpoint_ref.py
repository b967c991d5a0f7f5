"""References to checkpoints: a run (its newest checkpoint) or one checkpoint, by path or URL.

`raymix eval` and `raymix export` take such a reference.
"""

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
    """A checkpoint with its training state and its run, as far as they are known."""

    checkpoint: Path
    """Directory in Hugging Face format."""
    state: TrainingState | None
    """None for a directory that raymix did not write."""
    run: RunDirectory | None
    """The run in which it lies; None if it lies in none."""
    where: str
    """The checkpoint's path or URL."""

    def recipe(self, given: Recipe | None) -> Recipe:
        """Return `given`, or the recipe of the run.

        Raises:
            RecipeError: If there is neither.
        """
        if given is not None:
            return given
        if self.run is None:
            raise RecipeError.at(
                "checkpoint",
                self.where,
                "the checkpoint lies in no run, so its recipe is unknown",
                fix="Name the recipe with --recipe",
            )
        return self.run.recipe()


def find_checkpoint(path: str | Path) -> CheckpointRef:
    """Return the checkpoint at `path`, or the newest one of the run at `path`.

    Raises:
        RecipeError: If it is neither, or a run without a complete checkpoint.
        StorageError: If it is a URL and the store cannot be used.
    """
    if is_remote(str(path)):
        return _download(str(path).rstrip("/"))
    directory = Path(path)
    run = RunDirectory(directory)
    if run.resolved.is_file():
        newest = newest_checkpoint(run.checkpoints)
        if newest is None:
            raise _untrained(str(path))
        return CheckpointRef(*newest, run, str(newest[0]))
    if not (directory / "config.json").is_file():
        raise _not_a_checkpoint(str(path), exists=directory.exists())
    # Without one it is a model that raymix did not write, which can be scored, too.
    state = read_state(directory) if (directory / "state.json").is_file() else None
    # RUN/checkpoints/step-XXXXXXXX; resolved, as the path may be relative or a link.
    parent = RunDirectory(directory.resolve().parent.parent)
    parent_run = parent if parent.resolved.is_file() else None
    return CheckpointRef(directory, state, parent_run, str(directory))


def _download(url: str) -> CheckpointRef:
    """Return the checkpoint at a URL, in a temporary directory removed when this process ends."""
    files.check_store(url, "run")
    directory = Path(tempfile.mkdtemp(prefix="raymix-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    names = files.list_directory(url)
    if "config.json" in names:
        return _download_checkpoint(url, names, directory)
    # Not the run's own working directory: a process that trains may be writing there.
    run = RunDirectory(directory / url.rsplit("/", 1)[-1], url)
    run.mirror().fetch(*RECIPE_FILES, *LOG_FILES)
    if not run.resolved.is_file():
        # Stores have no empty directories: nothing listed means that nothing is there.
        raise _not_a_checkpoint(url, exists=bool(names))
    newest = newest_checkpoint_of(run)
    if newest is None:
        raise _untrained(url)
    path = fetch_checkpoint(run, newest[0])
    return CheckpointRef(path, newest[1], run, files.join(url, "checkpoints", path.name))


def _download_checkpoint(url: str, names: list[str], directory: Path) -> CheckpointRef:
    checkpoint = directory / url.rsplit("/", 1)[-1]
    checkpoint.mkdir()
    for name in names:
        download(files.join(url, name), checkpoint / name)
    state = read_state(checkpoint) if "state.json" in names else None
    run_url = url.rsplit("/", 2)[0]
    run = RunDirectory(directory / run_url.rsplit("/", 1)[-1], run_url)
    run.mirror().fetch(*RECIPE_FILES, *LOG_FILES)
    return CheckpointRef(checkpoint, state, run if run.resolved.is_file() else None, url)


def _untrained(location: str) -> RecipeError:
    return RecipeError.at(
        "run", location, "the run has no complete checkpoint yet", fix="Train it first"
    )


def _not_a_checkpoint(location: str, *, exists: bool) -> RecipeError:
    return RecipeError.at(
        "run",
        location,
        "neither a run directory nor a checkpoint" if exists else "no such directory",
        fix="Name a directory that `raymix train` made, or one with a config.json",
    )
