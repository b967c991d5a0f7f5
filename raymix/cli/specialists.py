"""`raymix specialists`: one model per domain from one base, merged by every method."""

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

# Domains are columns here: more would not fit on a line.
_MAX_DOMAINS_SHOWN = 8


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    *,
    set_overrides: SetOverrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often all of it is done.")] = 1,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where everything goes; else NAME-specialists beside run.dir."
        ),
    ] = None,
    parallel: Parallel = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny runs and few merges: the whole way in minutes.")
    ] = False,
    json: Json = False,
) -> None:
    """Fine-tune a specialist per domain from one base, merge them, and compare.

    Beside the merges stand the base, each domain's own specialist, and one model trained on all
    domains on as many tokens as all specialists together. Merges are scored as they are (scale 1)
    and at the scale that is best on other held-out rows. The recipe's section `specialists` says
    which domains, how they are fine-tuned, and what is merged. Running it again goes on: what is
    finished is not repeated. Ctrl-C stops with checkpoints.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console

        loaded = load(recipe, overrides, set_overrides)
        with trial_processes(loaded):
            from raymix.tuning.merges.specialists import specialists

            document = specialists(
                loaded,
                seeds=seeds,
                out=out,
                parallel=parallel,
                smoke=smoke,
            )
            draw(document, Console(highlight=False))
        return document

    run_command(work, json=json, failed=lambda document: bool(document.get("failed")))


def draw(document: Mapping[str, Any], console: Console) -> None:
    """Print for people: references and merges, their differences, domains, failures, files."""
    # rich assumes 80 columns without a terminal and would cut the table.
    if not console.is_terminal:
        console.width = 140
    fancy = console.is_terminal
    seeds = ", ".join(str(seed) for seed in document["seeds"])
    console.print(
        f"\nheld-out loss, nats per token, mean over {', '.join(document['domains'])}: mean and "
        f"standard deviation over seeds {seeds}. Specialists: {document['tokens']:,} tokens each, "
        f"every domain by its own; joint: {document['joint_tokens']:,} tokens of all. Recovered: "
        "of the way from the base to the specialists",
        soft_wrap=True,
    )
    console.print(_models(document, fancy=fancy))
    first = next(iter(document["merges"]), None)
    if len(document["merges"]) > 1:
        about = f"\ndifference to {first}, each seed to itself, with 95 % interval"
        console.print(about, soft_wrap=True)
        console.print(_differences(document, str(first), fancy=fancy))
    console.print("\nby domain, merges at their best scale")
    console.print(_domains(document, fancy=fancy))
    if shared := ", ".join(document["held_out"]["shared"]):
        note = f"note: one document is all that is held out of {shared}: it is chosen by, too"
        console.print(note, markup=False, soft_wrap=True)
    for name, problem in document["problems"].items():
        # A problem may hold a list in brackets, which rich would read as markup.
        console.print(f"{name}: {problem}", markup=False, soft_wrap=True)
    console.print("files: " + ", ".join(document["files"]), markup=False, soft_wrap=True)


def _models(document: Mapping[str, Any], *, fancy: bool) -> Table:
    from raymix.report.formatting import (
        difference,
        percent_with_spread,
        scale_range,
        with_spread,
    )

    at_one, there = ("loss at scale 1", "recovered"), ("best scale", "loss there", "recovered")
    table = plain_table("model", *at_one, *there, "to joint", fancy=fancy)
    for name, row in document["rows"].items():
        to_joint = "" if name == "joint" else difference(row["to_joint"])
        cells = [with_spread(row["mean"]), percent_with_spread(row["recovered"])]
        table.add_row(name, *cells, "", "", "", to_joint)
    for name, row in document["merges"].items():
        given, best = row["given"], row["best"]
        cells = [with_spread(given["mean"]), percent_with_spread(given["recovered"])]
        scaled = [with_spread(best["mean"]), percent_with_spread(best["recovered"])]
        cells += [scale_range(row["scale"]), *(scaled if row["scale"] else ["", ""])]
        table.add_row(name, *cells, difference(best["to_joint"]))
    return table


def _differences(document: Mapping[str, Any], first: str, *, fancy: bool) -> Table:
    from raymix.report.formatting import difference

    table = plain_table("method", "at scale 1", "at the best scale", fancy=fancy)
    for name in document["merges"]:
        if name != first:
            differences = [document["differences"][at][name][first] for at in ("given", "best")]
            table.add_row(name, *(difference(item) for item in differences))
    return table


def _domains(document: Mapping[str, Any], *, fancy: bool) -> Table:
    domains = document["domains"][:_MAX_DOMAINS_SHOWN]
    table = plain_table("model", *domains, fancy=fancy)
    rows = document["rows"] | {name: row["best"] for name, row in document["merges"].items()}
    for name, row in rows.items():
        table.add_row(name, *(f"{row['domains'][d]['mean']:.4f}" for d in domains))
    return table
