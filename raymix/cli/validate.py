"""`raymix validate`: all faults of a recipe at once."""

from __future__ import annotations

from typing import Any

from raymix.cli._run import Json, Overrides, RecipeSource, SetOverrides, load, run_command


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    set_overrides: SetOverrides = None,
    json: Json = False,
) -> None:
    """Check a recipe and report every problem at once.

    Looks at the recipe alone; `raymix plan` also looks at the corpus, the model and the machine.
    """

    def work() -> dict[str, Any]:
        loaded = load(recipe, overrides, set_overrides)
        # `load` has raised for an invalid recipe, so the document can say so without a check.
        print(f"{recipe} is valid: run {loaded.name!r}, {len(loaded.corpus.domains)} domains.")
        # With all defaults, and in JSON types: the document is what would run.
        return {"valid": True, "recipe": loaded.model_dump(mode="json")}

    run_command(work, json=json)
