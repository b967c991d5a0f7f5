"""Paths in a recipe, and whether they will exist where the job runs.

Relative sources are shipped with the project, so they must be files of it. Absolute paths, URLs and
names of the Hub are taken as the cluster sees them. Relative results need a directory that outlives
the job; an input that is not here may be the result of an earlier job, and is looked for there.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymix.errors import RecipeError, format_problem
from raymix.jobs.files import Listing
from raymix.recipe import Recipe
from raymix.recipe.paths import PathField, absolute, is_url, map_override, map_paths


@dataclass(frozen=True, slots=True)
class Reference:
    """A relative path in a recipe."""

    at: str
    """The dotted path of its field."""
    path: str
    """As it is written."""
    field: PathField
    location: str
    """The absolute path, here."""

    @property
    def below_storage(self) -> str:
        """Return the path below a job's storage: as written, without leading `../`."""
        parts = Path(os.path.normpath(self.path)).parts
        return "/".join(part for part in parts if part != "..")


def references(recipe: Recipe, base: str) -> list[Reference]:
    """Return the relative paths of a recipe, which start at the directory `base`.

    Names of the Hub that are no files or directories there are left out.
    """
    found: list[Reference] = []

    def add(path: str, field: PathField, at: str) -> str:
        location = absolute(path, field, base)
        if location not in field.words and not is_url(location) and not path.startswith(("/", "~")):
            found.append(Reference(at, path, field, location))
        return path

    map_paths(recipe, add)
    return found


def check_sources(listed: Sequence[Reference], base: str, listing: Listing) -> None:
    """Check that every relative source, and every input that exists here, is among the files.

    Args:
        listed: The relative paths of the recipe.
        base: The directory at which they start.
        listing: The files to ship.

    Raises:
        RecipeError: With one message per path that would be missing.
    """
    shipped = set(listing.files)
    problems = [
        message
        for reference in listed
        if reference.field.role == "source" or is_here(reference)
        for message in _missing(reference, base, listing, shipped)
    ]
    if problems:
        raise RecipeError(*problems)


def is_here(reference: Reference) -> bool:
    """Return whether an input exists on this machine."""
    return reference.field.role == "input" and os.path.exists(reference.location)


def in_project(location: str, listing: Listing) -> str | None:
    """Return a location relative to the project; None for one outside of it."""
    # As written first: a link inside the project travels under its own name.
    for path in (location, os.path.realpath(location)):
        if Path(path).is_relative_to(listing.root):
            return Path(path).relative_to(listing.root).as_posix()
    return None


def shipped_value(path: str, value: Any, listing: Listing, project: str) -> Any:
    """Return the value of an override that is typed here, for a job in another directory.

    Args:
        path: The field's dotted path.
        value: The value; relative paths in it start at the working directory.
        listing: The files to ship.
        project: The directory of the project where the job runs.
    """

    def moved(path: str, field: PathField, _: str) -> str:
        location = absolute(path, field, os.getcwd())
        if field.role == "result" or location in field.words or is_url(location):
            return location if is_url(location) else path
        if path.startswith(("/", "~")) or (inside := in_project(location, listing)) is None:
            return path
        return f"{project}/{inside}"

    return map_override(path, value, moved)


def check_results(listed: Sequence[Reference]) -> None:
    """Check that no output path is relative: it would be lost with the job's directory.

    Raises:
        RecipeError: With one message per result that would be lost with the job's directory.
    """
    problems = [
        format_problem(
            reference.at,
            reference.path,
            "relative: a job's own directory goes with the job",
            fix=(
                "Name a directory that all nodes see by --storage, or give an absolute "
                "path or a URL"
            ),
        )
        for reference in listed
        if reference.field.role == "result"
    ]
    if problems:
        raise RecipeError(*problems)


def _missing(reference: Reference, base: str, listing: Listing, shipped: set[str]) -> list[str]:
    """Return why the files of a relative path will be missing on the cluster; empty if none."""

    def problem(text: str, fix: str = "") -> list[str]:
        return [format_problem(reference.at, reference.path, text, fix=fix)]

    # Brackets and stars are a pattern in what the recipe says, but not in the base's own name.
    pattern = os.path.join(glob.escape(base), reference.path)
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        return problem("no file matches")
    for match in matches:
        inside = in_project(os.path.abspath(match), listing)
        if inside is None:
            return problem(
                f"{match} lies outside of the project, which is {listing.root}",
                "Name a directory above both by --project, or give a path that the cluster has",
            )
        if not _is_shipped(inside, listing.root / inside, shipped):
            return problem(
                f"{inside} does not travel: {listing.reason(inside)}",
                "Take it out of .gitignore, give it another name, or give a URL or a path that the "
                "cluster has",
            )
    return []


def _is_shipped(name: str, path: Path, shipped: set[str]) -> bool:
    if name in shipped:
        return True
    # With the slash: `data.txt` and `data2/` are not in `data`.
    return path.is_dir() and any(file.startswith(f"{name}/") for file in shipped)
