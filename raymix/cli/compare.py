"""`raymix compare`: one recipe under several mixers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import (
    Json,
    Overrides,
    Parallel,
    RecipeSource,
    SetOverrides,
    load,
    plain_table,
    run_command,
    trial_processes,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# About a screen; the files that the last line names hold every domain.
_MAX_DOMAINS = 40


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    *,
    set_overrides: SetOverrides = None,
    mixers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Separated by commas: kinds (pike), presets (pike-balanced), kinds with fields "
            "(pike(tau=1)), or files with a mixer section.",
        ),
    ] = "uniform,proportional",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per mixer, each of its own seed.")] = 3,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the runs go; else NAME-compare beside run.dir."),
    ] = None,
    parallel: Parallel = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The mixer that differences are to; else the first."),
    ] = None,
    json: Json = False,
) -> None:
    """Train the same model on the same tokens and seeds under several mixers, and compare.

    Says, with spread over seeds, which mixer ends with the lower held-out loss per domain, in the
    mean, in the worst domain and on targets, and what measuring for it cost. Running it again
    goes on: finished runs are not repeated. Ctrl-C stops with checkpoints.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console

        loaded = load(recipe, overrides, set_overrides)
        with trial_processes(loaded):
            from raymix.tuning.compare.compare import compare

            document = compare(
                loaded,
                mixers=mixers,
                seeds=seeds,
                out=out,
                parallel=parallel,
                baseline=baseline,
            )
            draw(document, Console(highlight=False))
        return document

    # One run that failed makes the exit code 1, so that scripts notice; the document is complete.
    run_command(work, json=json, failed=lambda document: bool(document.get("failed")))


def draw(document: Mapping[str, Any], console: Console) -> None:
    """Print the comparison for people: mixers, differences, domains, failed runs, files."""
    if not console.is_terminal:
        # rich assumes 80 columns without a terminal; every mixer is a column of about 20.
        console.width = max(120, 40 + 20 * len(document["mixers"]))
    seeds = ", ".join(str(seed) for seed in document["seeds"])
    console.print(
        f"\nheld-out loss after {document['tokens']:,} tokens, nats per token: mean and standard "
        f"deviation over seeds {seeds}",
        soft_wrap=True,
    )
    fancy = console.is_terminal
    console.print(_mixers(document, fancy=fancy))
    if len(document["mixers"]) > 1:
        # Paired by seed: noise that both runs of a pair share cancels in their difference.
        about = f"\ndifference to {document['baseline']}, each seed to itself, with 95 % interval"
        console.print(about, soft_wrap=True)
        console.print(_differences(document, fancy=fancy))
    console.print()
    console.print(_domains(document, width=console.width, fancy=fancy))
    for run in document["runs"]:
        if run["state"] != "done":
            # A problem may hold a list in brackets, which rich would read as markup.
            failure = f"{run['mixer']}, seed {run['seed']}: {run['problem']}"
            console.print(failure, markup=False, soft_wrap=True)
    console.print("files: " + ", ".join(document["files"]), markup=False, soft_wrap=True)


def _measures(document: Mapping[str, Any]) -> list[str]:
    rows = document["mixers"].values()
    return [name for name in ("mean", "worst", "target") if any(name in row for row in rows)]


def _mixers(document: Mapping[str, Any], *, fancy: bool) -> Table:
    from raymix.report.formatting import percent, with_spread

    measures = _measures(document)
    table = plain_table("mixer", "runs", *measures, "worst is", "extra compute", fancy=fancy)
    for name, row in document["mixers"].items():
        runs = f"{row['runs']}/{row['planned']}"
        losses = [with_spread(row[measure]) for measure in measures]
        cost = percent(row["extra"]["flops_share"]["mean"])
        table.add_row(name, runs, *losses, row["worst_domain"] or "", cost)
    return table


def _differences(document: Mapping[str, Any], *, fancy: bool) -> Table:
    from raymix.report.formatting import difference

    measures = _measures(document)
    table = plain_table("mixer", *measures, fancy=fancy)
    for name, row in document["mixers"].items():
        if name != document["baseline"]:
            cells = [difference(row[measure]["difference"]) for measure in measures]
            table.add_row(name, *cells)
    return table


def _domains(document: Mapping[str, Any], *, width: int, fancy: bool) -> Table:
    """Return the losses per domain, without their spread where there is no room for it."""
    from raymix.report.formatting import with_spread

    rows = document["mixers"]
    names = [*document["domains"], *document["targets"]]
    # 9 is the length of " (target)", 17 that of a loss with its
    # spread and the gap to the next column.
    needed = max([0, *map(len, names)]) + 9 + sum(max(17, len(name) + 2) for name in rows)
    table = plain_table("domain", *rows, fancy=fancy)
    for name in names[:_MAX_DOMAINS]:
        suffix = " (target)" if name in document["targets"] else ""
        results = [row["domains"][name] for row in rows.values()]
        cells = [with_spread(item) for item in results]
        if needed > width:
            cells = [cell.partition(" ")[0] for cell in cells]
        table.add_row(f"{name}{suffix}", *cells)
    if len(names) > _MAX_DOMAINS:
        table.add_row(f"... {len(names) - _MAX_DOMAINS} more in the files")
    return table
