"""`raymix init`: a commented recipe to start from."""

from __future__ import annotations

import json as json_module
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from raymix.cli._run import Json, run_command


def command(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The recipe to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe to start from, and its JSON schema beside it for editors."""

    def work() -> dict[str, Any]:
        schema = write_recipe(path, force=force)
        print(f"Wrote {path} and {schema}.")
        print(f"Next: name your files in it, then `raymix plan {path}`.")
        return {"recipe": path, "schema": schema}

    run_command(work, json=json)


def write_recipe(path: str, *, force: bool) -> str:
    """Write a commented recipe and its schema; return the schema's path.

    Raises:
        RecipeError: If the file exists and `force` is not set, or its name is no file name.
    """
    from raymix.errors import RecipeError
    from raymix.recipe import commented_recipe, recipe_schema
    from raymix.recipe.schema import SCHEMA_FILE
    from raymix.store import atomic_write_text

    # Even with --force: a file cannot take the place of a directory.
    if os.path.isdir(path):
        raise RecipeError.at("file", path, "a directory", fix="Name a file in it")
    if os.path.exists(path) and not force:
        raise RecipeError.at("file", path, "exists", fix="Use --force to overwrite it")
    # The name of any file becomes one that recipes allow: a letter or digit first, 128 characters.
    name = re.sub(r"[^A-Za-z0-9_.-]+|^[^A-Za-z0-9]+", "-", Path(path).stem).strip("-.") or "run"
    # Beside the recipe, whose first line refers editors to it by a relative name.
    schema = str(Path(path).parent / SCHEMA_FILE)
    atomic_write_text(path, commented_recipe(name[:128]))
    atomic_write_text(schema, json_module.dumps(recipe_schema(), indent=2) + "\n")
    return schema
