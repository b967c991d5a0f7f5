"""A job made ready: what travels, and the shell line that runs it where it lands."""

from __future__ import annotations

import os
import posixpath
import secrets
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from raymix.errors import RecipeError, did_you_mean
from raymix.jobs.files import Listing, find_project, list_files
from raymix.jobs.references import check_results, check_sources, results, shipped_inputs
from raymix.recipe import Recipe, read_recipe, recipe_files
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote

# Command, and whether it leaves results behind.
COMMANDS = {
    "validate": False,
    "plan": False,
    "prepare": True,
    "train": True,
    "compare": True,
    "tune": True,
}
_MANY_RUNS = ("compare", "tune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job that can be sent."""

    name: str
    """Its name on the cluster: one of a kind."""
    command: str
    """The `raymix` command that it runs."""
    entrypoint: str
    """The shell line that runs it in the directory of the project."""
    listing: Listing
    """What travels."""
    storage: str | None
    """The cluster's directory or URL of its results; None where the recipe gives absolute ones."""


def prepare_submission(
    command: str,
    recipe: str,
    arguments: Sequence[str] = (),
    *,
    project: str | os.PathLike[str] | None = None,
    storage: str | None = None,
) -> Submission:
    """Return the job that runs `raymix COMMAND RECIPE` on a cluster, all its input checked.

    Args:
        command: One of `COMMANDS`.
        recipe: A recipe's file, or `module:function`.
        arguments: What follows the recipe: `FIELD=VALUE` and options of the command.
        project: The directory that travels; left out, the nearest from the recipe upwards that
            git or a pyproject.toml marks, else the recipe's own.
        storage: A directory that all nodes of the cluster see, or a URL for commands of one run.
            Relative results go below it.

    Raises:
        RecipeError: If the command or the recipe cannot work there; names every fault found.
    """
    if command not in COMMANDS:
        near = did_you_mean(command, COMMANDS)
        raise RecipeError.at(
            "command",
            command,
            "not a command of jobs",
            allowed=f"Allowed: {', '.join(COMMANDS)}",
            fix=near,
        )
    overrides = takewhile(lambda word: not word.startswith("-"), arguments)
    model, base = read_recipe(recipe, list(overrides))
    listing = list_files(Path(project) if project is not None else find_project(Path(base)))
    check_sources(model, base, listing)
    moved = shipped_inputs(model, listing)
    if COMMANDS[command] and storage is None:
        check_results(model)
    below = _below(command, model, storage) if storage is not None else []
    words = [*arguments, *below]
    directory = storage if storage is not None and storage.startswith("/") else None
    line = _entrypoint(command, _place(recipe, listing), words, moved, directory)
    name = f"raymix-{command}-{model.name}-{secrets.token_hex(4)}"
    return Submission(name=name, command=command, entrypoint=line, listing=listing, storage=storage)


def _below(command: str, recipe: Recipe, storage: str) -> list[str]:
    """Return the changes to a recipe that put its relative results below a URL; none for a path.

    Raises:
        RecipeError: If it is neither a path nor a URL, or the command needs a directory.
    """
    if storage.startswith("/"):
        return []
    advice = "Name a directory that all nodes of the cluster see"
    if not is_remote(storage):
        raise RecipeError.at("storage", storage, "neither an absolute path nor a URL", fix=advice)
    if command in _MANY_RUNS:
        raise RecipeError.at(
            "storage",
            storage,
            f"`raymix {command}` writes to a directory, not to a URL",
            fix=advice,
        )
    return [
        f"{reference.field}={files.join(storage, posixpath.normpath(reference.path))}"
        for reference in results(recipe)
        if reference.relative
    ]


def _place(recipe: str, listing: Listing) -> str:
    """Return the recipe as a word of the job's shell line.

    Raises:
        RecipeError: If it is a file that does not travel, or extends one that does not.
    """
    if not os.path.exists(recipe):
        return shlex.quote(recipe)
    inside = [_inside(path, listing) for path in recipe_files(recipe)]
    return f'"$project"/{shlex.quote(inside[0])}'


def _inside(path: str, listing: Listing) -> str:
    """Return where in the project a file of the recipe lies.

    Raises:
        RecipeError: If it does not travel.
    """
    inside: str | None = None
    with suppress(ValueError):
        inside = Path(path).resolve().relative_to(listing.root).as_posix()
    if inside is None or inside not in listing.files:
        raise RecipeError.at(
            "recipe",
            path,
            f"not among the files of the project {listing.root} that travel",
            fix="Put it there, take it out of .gitignore, or name another --project",
        )
    return inside


def _entrypoint(
    command: str,
    recipe: str,
    arguments: Sequence[str],
    moved: dict[str, str],
    storage: str | None,
) -> str:
    words = [shlex.quote(word) for word in arguments]
    words += [f'{field}="$project"/{shlex.quote(place)}' for field, place in moved.items()]
    # The job's own cluster, whichever the recipe names; RAY_ADDRESS is set for it there.
    words.append("cluster.address=auto")
    work = " ".join(["exec python -m raymix", command, recipe, *words])
    if storage is None:
        return f'project="$PWD"; {work}'
    place = shlex.quote(storage)
    return f'project="$PWD"; mkdir -p {place} && cd {place} && {work}'
