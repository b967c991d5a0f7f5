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

DomainsFrom = Annotated[
    int | None,
    typer.Option(
        metavar="STEP",
        min=1,
        help="Go on with other domains from this step on, that of the newest checkpoint.",
    ),
]
FromStep = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Go back to the newest whole checkpoint at or before step N; later ones are moved "
        "aside.",
    ),
]


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
    domains_from: DomainsFrom = None,
    from_step: FromStep = None,
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
        loaded = load(recipe, overrides, set_overrides)
        from raymix.training.launch.preload import forked_training_workers

        with forked_training_workers(loaded):
            from raymix.training.api import train

            return train(
                loaded,
                if_exists=if_exists.value,
                extend=extend,
                domains_from=domains_from,
                from_step=from_step,
                report=report,
            )

    run_command(work, json=json)
