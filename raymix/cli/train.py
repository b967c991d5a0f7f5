"""`raymix train`: from a recipe to a trained model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymix.cli._run import (
    IfExists,
    Json,
    Overrides,
    RecipeSource,
    SetOverrides,
    load,
    run_command,
)


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    set_overrides: SetOverrides = None,
    *,
    if_exists: Annotated[
        IfExists,
        typer.Option(
            help="A run directory that is there: go on with a run of the same recipe, refuse, or "
            "take a fresh directory beside it."
        ),
    ] = IfExists.RESUME,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Train the run that is there for longer: train.steps may be larger than its own.",
        ),
    ] = False,
    from_step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Go back to the newest whole checkpoint at or before step N; later ones are moved "
            "aside.",
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Draw report.html at the end.")] = True,
    json: Json = False,
) -> None:
    """Train a model: prepare the corpus if needed, train, checkpoint, report.

    Running it again goes on from the newest checkpoint, with the very same batches. Ctrl-C stops
    with a checkpoint; a second one stops at once.
    """

    def work() -> dict[str, Any]:
        import os
        import sys

        from raymix._utils.stages import show_stages, stage

        # On a terminal one live line says the same.
        show_stages(show=not json and not sys.stdout.isatty())
        stage("reading the recipe")
        from raymix.training.launch.cluster import thread_environment

        # Before the next import, which loads torch: OpenMP reads its variables only then.
        os.environ |= thread_environment()
        from raymix.training.api import train

        loaded = load(recipe, overrides, set_overrides)
        return train(
            loaded,
            if_exists=if_exists.value,
            extend=extend,
            from_step=from_step,
            report=report,
        )

    run_command(work, json=json)
