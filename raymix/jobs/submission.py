"""Submissions: the files to ship, and the shell line that runs the command on the cluster."""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from raymix.errors import RecipeError, did_you_mean
from raymix.jobs.files import Listing, find_project, list_files
from raymix.jobs.references import (
    Reference,
    check_results,
    check_sources,
    in_project,
    is_here,
    references,
    shipped_value,
)
from raymix.recipe import read_recipe, recipe_files
from raymix.recipe.overrides import split_override
from raymix.store.remote import files
from raymix.store.remote.errors import is_remote

# Commands that run as jobs, and whether they write results.
COMMANDS = {
    "validate": False,
    "plan": False,
    "prepare": True,
    "train": True,
    "compare": True,
    "tune": True,
}
_MULTI_RUN_COMMANDS = ("compare", "tune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job that is ready to be sent."""

    name: str
    """Its unique name on the cluster."""
    command: str
    """The `raymix` command that it runs."""
    entrypoint: str
    """The shell line that runs it in the directory of the project."""
    listing: Listing
    """The files to ship."""
    storage: str | None
    """The cluster's directory or URL for results; None where the recipe has absolute ones."""


def prepare_submission(
    command: str,
    recipe: str,
    arguments: Sequence[str] = (),
    *,
    project: str | os.PathLike[str] | None = None,
    storage: str | None = None,
) -> Submission:
    """Return the job that runs `raymix COMMAND RECIPE` on a cluster, with all inputs checked.

    Args:
        command: One of `COMMANDS`.
        recipe: A recipe's file, or `module:function`.
        arguments: Arguments after the recipe: `FIELD=VALUE` and options of the command.
        project: The directory to ship; left out, the nearest one from the recipe upwards with a
            .git or pyproject.toml, else the recipe's own.
        storage: A directory that all nodes of the cluster see, or a URL for commands of one run.
            Relative results go below it, as the recipe names them.

    Raises:
        RecipeError: If the command or the recipe cannot work there; names every fault.
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
    # Overrides end at the first option: a later word may be the value of one.
    overrides = list(takewhile(lambda word: not word.startswith("-"), arguments))
    model, base = read_recipe(recipe, overrides)
    listing = list_files(Path(project) if project is not None else find_project(Path(base)))
    listed = references(model, base)
    check_sources(listed, base, listing)
    if COMMANDS[command] and storage is None:
        check_results(listed)
    words = [_word(override, listing) for override in overrides]
    words += [shlex.quote(word) for word in arguments[len(overrides) :]]
    # Inputs of a function's recipe start at the job's directory, so each is named.
    words += [
        f'{reference.at}="$project"/{shlex.quote(inside)}'
        for reference in listed
        if is_here(reference) and (inside := in_project(reference.location, listing))
    ]
    if storage is not None:
        words += map(shlex.quote, _storage_overrides(command, listed, storage))
    directory = storage if storage is not None and storage.startswith("/") else None
    line = _entrypoint(command, _recipe_word(recipe, listing), words, directory)
    # Ray refuses a second job of a name, and the same recipe may be sent again.
    name = f"raymix-{command}-{model.name}-{secrets.token_hex(4)}"
    return Submission(name=name, command=command, entrypoint=line, listing=listing, storage=storage)


def _word(override: str, listing: Listing) -> str:
    """Return an override as a word of the job's shell line, its paths those of the project."""
    path, value = split_override(override)
    # A character that no path has stands for the directory, which only the job's shell knows.
    moved = shipped_value(path, value, listing, "\0")
    if moved == value:
        return shlex.quote(override)
    text = moved if isinstance(moved, str) else json.dumps(moved, ensure_ascii=False)
    quoted = shlex.quote(f"{path}={text}".replace("\\u0000", "\0"))
    return quoted.replace("\0", "'\"$project\"'")


def _storage_overrides(command: str, listed: Sequence[Reference], storage: str) -> list[str]:
    """Return the overrides that put relative results below a job's storage.

    Inputs that are not here are taken to be results of other jobs there.

    Raises:
        RecipeError: If it is neither a path nor a URL, or the command needs a directory.
    """
    advice = "Name a directory that all nodes of the cluster see"
    if not storage.startswith("/") and not is_remote(storage):
        raise RecipeError.at("storage", storage, "neither an absolute path nor a URL", fix=advice)
    if is_remote(storage) and command in _MULTI_RUN_COMMANDS:
        raise RecipeError.at(
            "storage",
            storage,
            f"`raymix {command}` writes to a directory, not to a URL",
            fix=advice,
        )
    # Models and logs are read from directories, so those of a URL are left as they are.
    roles = ("result",) if is_remote(storage) else ("result", "input")
    return [
        f"{reference.at}={files.join(storage, reference.below_storage)}"
        for reference in listed
        if reference.field.role in roles and not is_here(reference)
    ]


def _recipe_word(recipe: str, listing: Listing) -> str:
    """Return the recipe as a word of the job's shell line.

    Raises:
        RecipeError: If it, or a file that it extends, is not shipped.
    """
    if not os.path.exists(recipe):
        return shlex.quote(recipe)
    inside = [_inside(path, listing) for path in recipe_files(recipe)]
    # Left to the job's shell: only on the cluster is the project's directory known.
    return f'"$project"/{shlex.quote(inside[0])}'


def _inside(path: str, listing: Listing) -> str:
    """Return the path in the project of a file of the recipe.

    Raises:
        RecipeError: If it is not shipped.
    """
    inside: str | None = None
    with suppress(ValueError):
        inside = Path(path).resolve().relative_to(listing.root).as_posix()
    if inside is None or inside not in listing.files:
        why = "" if inside is None else f": {listing.reason(inside)}"
        raise RecipeError.at(
            "recipe",
            path,
            f"not among the files of the project {listing.root} that travel{why}",
            fix="Put it there, take it out of .gitignore, or name another --project",
        )
    return inside


def _entrypoint(command: str, recipe: str, words: Sequence[str], storage: str | None) -> str:
    """Return the job's shell line; `recipe` and `words` are quoted: none can start a command."""
    # The last word: the cluster that runs the job, whatever the recipe names (Ray sets RAY_ADDRESS
    # in jobs). `exec`, so that the process Ray starts, signals and waits for is Python itself, not
    # a shell around it.
    work = " ".join(["exec python -m raymix", command, recipe, *words, "cluster.address=auto"])
    if storage is None:
        return f'project="$PWD"; {work}'
    directory = shlex.quote(storage)
    return f'project="$PWD"; mkdir -p {directory} && cd {directory} && {work}'
