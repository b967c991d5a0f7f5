"""Paths in a recipe, and whether they will exist where the job runs.

Relative sources are shipped with the project, so they must be files of it. Absolute paths and URLs
are taken as the cluster sees them. Relative results need a directory that outlives the job.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raymix.errors import RecipeError, format_problem
from raymix.jobs.files import Listing
from raymix.recipe import (
    DgaMixer,
    PretrainedModel,
    PretrainedTokenizer,
    Recipe,
    ReplayMixer,
)
from raymix.recipe.load import absolute


@dataclass(frozen=True, slots=True)
class Reference:
    """A path in a recipe."""

    field: str
    """The field that holds it, by dotted path."""
    path: str
    """As it is written."""

    @property
    def relative(self) -> bool:
        """Return whether the path depends on the working directory."""
        # Asked of `absolute`, so that the same rule decides what a URL is.
        is_url = absolute(self.path, "/") == self.path
        return not is_url and not os.path.isabs(os.path.expanduser(self.path))


def sources(recipe: Recipe) -> Iterator[Reference]:
    """Yield the paths that start at the recipe's own directory."""
    for at, domain in enumerate(recipe.corpus.domains):
        for name in ("train", "valid"):
            for index, path in enumerate(getattr(domain, name)):
                yield Reference(f"corpus.domains.{at}.{name}.{index}", path)
    if isinstance(recipe.corpus.tokenizer, PretrainedTokenizer):
        yield Reference("corpus.tokenizer.path", recipe.corpus.tokenizer.path)
    if isinstance(recipe.mixer, DgaMixer) and isinstance(recipe.mixer.bases, str):
        yield Reference("mixer.bases", recipe.mixer.bases)


def inputs(recipe: Recipe) -> Iterator[Reference]:
    """Yield the input paths that start at the working directory."""
    if isinstance(recipe.model, PretrainedModel):
        yield Reference("model.path", recipe.model.path)
    if isinstance(recipe.mixer, ReplayMixer):
        yield Reference("mixer.log", recipe.mixer.log)


def results(recipe: Recipe) -> Iterator[Reference]:
    """Yield the output paths; relative ones start at the working directory."""
    yield Reference("corpus.path", recipe.corpus.path)
    yield Reference("run.dir", recipe.run.dir)


def check_sources(recipe: Recipe, base: str, listing: Listing) -> None:
    """Check that every relative source is among the files to ship.

    Args:
        recipe: The recipe, its paths as they were written.
        base: The directory at which its relative sources start.
        listing: The files to ship.

    Raises:
        RecipeError: With one message per source that would be missing.
    """
    shipped = set(listing.files)
    problems = [
        message
        for reference in sources(recipe)
        if reference.relative
        for message in _missing(reference, base, listing, shipped)
    ]
    if problems:
        raise RecipeError(*problems)


def shipped_inputs(recipe: Recipe, listing: Listing) -> dict[str, str]:
    """Return, by field, the path in the project of each relative input that exists here.

    An input that does not exist here is assumed to exist in the job's working directory.

    Raises:
        RecipeError: If one exists here and is not shipped.
    """
    shipped = set(listing.files)
    locations: dict[str, str] = {}
    problems: list[str] = []
    for reference in inputs(recipe):
        location = absolute(reference.path, os.getcwd())
        if not reference.relative or not os.path.exists(location):
            continue
        problems += _missing(reference, os.getcwd(), listing, shipped)
        # The root of the listing has its links resolved, so the location needs that, too.
        with_root = os.path.relpath(os.path.realpath(location), listing.root)
        locations[reference.field] = Path(with_root).as_posix()
    if problems:
        raise RecipeError(*problems)
    return locations


def check_results(recipe: Recipe) -> None:
    """Check that no output path is relative: it would be lost with the job's directory.

    Raises:
        RecipeError: With one message per result that would be lost with the job's directory.
    """
    problems = [
        format_problem(
            reference.field,
            reference.path,
            "relative: a job's own directory goes with the job",
            fix=(
                "Name a directory that all nodes see by --storage, or give an absolute "
                "path or a URL"
            ),
        )
        for reference in results(recipe)
        if reference.relative
    ]
    if problems:
        raise RecipeError(*problems)


def _missing(reference: Reference, base: str, listing: Listing, shipped: set[str]) -> list[str]:
    """Return why the files of a relative path will be missing on the cluster; empty if none."""
    # Brackets and stars are a pattern in what the recipe says, but not in the base's own name.
    pattern = os.path.join(glob.escape(base), os.path.expanduser(reference.path))
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        return [format_problem(reference.field, reference.path, "no file matches")]
    for match in matches:
        # As written first: a link inside the project travels under its own name.
        inside = Path(os.path.abspath(match))
        if not inside.is_relative_to(listing.root):
            inside = Path(os.path.realpath(match))
        if not inside.is_relative_to(listing.root):
            return [
                format_problem(
                    reference.field,
                    reference.path,
                    f"{match} lies outside of the project, which is {listing.root}",
                    fix=(
                        "Name a directory above both by --project, "
                        "or give a path that the cluster has"
                    ),
                )
            ]
        name = inside.relative_to(listing.root).as_posix()
        if not _is_shipped(name, inside, shipped):
            return [
                format_problem(
                    reference.field,
                    reference.path,
                    f"{name} does not travel: an ignore file names it, or a link leads outwards",
                    fix="Take it out of .gitignore, or give a URL or a path that the cluster has",
                )
            ]
    return []


def _is_shipped(name: str, path: Path, shipped: set[str]) -> bool:
    if name in shipped:
        return True
    # With the slash: `data.txt` and `data2/` are not in `data`.
    return path.is_dir() and any(file.startswith(f"{name}/") for file in shipped)
