"""`raymix schema`: the JSON schema of recipes."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from raymix.cli._run import Json, run_command


def command(
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write it here, not to stdout.")
    ] = None,
    json: Json = False,
) -> None:
    """Print the JSON schema of recipes, for editors.

    An editor that knows YAML schemas checks and completes a recipe that begins with the line
    `# yaml-language-server: $schema=raymix.schema.json` and has the file beside it.
    """

    def work() -> dict[str, Any]:
        from raymix.recipe import recipe_schema
        from raymix.store import atomic_write_text

        schema = recipe_schema()
        text = json_module.dumps(schema, indent=2) + "\n"
        if out is None:
            print(text, end="")
        else:
            atomic_write_text(out, text)
            print(f"Wrote {out}.")
        # The schema is the document itself: --json prints the same on stdout as no option.
        return schema

    run_command(work, json=json)
