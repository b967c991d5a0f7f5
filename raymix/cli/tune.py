"""`raymix tune`: find the best shares by small runs and a mixing law, and verify them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

_MAX_DOMAINS_SHOWN = 40


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    *,
    set_overrides: SetOverrides = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the runs go; else NAME-tune beside run.dir."),
    ] = None,
    parallel: Parallel = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few tiny runs: the whole way in minutes.")
    ] = False,
    if_exists: Annotated[
        Literal["resume", "fail", "new"],
        typer.Option(help="What to do where DIR holds a search: go on, stop, or use another."),
    ] = "resume",
    json: Json = False,
) -> None:
    """Train small models on many mixtures, fit a law, and try the mixture it thinks best.

    The recipe's section `tune` says which mixtures, which law, what to minimize and within what
    limits. Ends with predicted and measured losses side by side: of the law's optimum, the best
    mixtures observed, uniform and proportional shares, over new seeds. Running it again goes on:
    finished runs are not repeated. Ctrl-C stops with checkpoints.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console

        loaded = load(recipe, overrides, set_overrides)
        with trial_processes(loaded):
            from raymix.tuning.mixtures.tune import tune

            document = tune(
                loaded,
                out=out,
                parallel=parallel,
                smoke=smoke,
                if_exists=if_exists,
            )
            draw(document, Console(highlight=False))
        return document

    run_command(work, json=json, failed=lambda document: bool(document.get("failed")))


def draw(document: Mapping[str, Any], console: Console) -> None:
    """Print the search for people: the law's worth, the verified mixtures, shares, files."""
    # rich assumes 80 columns without a terminal and would cut the table.
    if not console.is_terminal:
        console.width = 132
    fancy = console.is_terminal
    judged = document["judged"]
    console.print(f"\nlaw: {document['law']}. {judged['verdict']}", soft_wrap=True, markup=False)
    about = (
        f"\nhow well laws predict {document['rows']} losses of {len(document['runs'])} small runs; "
        "unseen: runs left out; later: the later steps, from the earlier ones"
    )
    console.print(about, soft_wrap=True)
    console.print(_judgment_table(judged, fancy=fancy))
    console.print(
        f"\nloss after {document['steps']:,} steps, nats per token ({_minimized(document)}): "
        f"predicted with 95 % interval, and measured over seeds {document['seeds'] or 'none'}",
        soft_wrap=True,
        markup=False,
    )
    console.print(_verified(document, fancy=fancy))
    for warning in document["optimum"].get("warnings", ()):
        console.print(f"optimum: {warning}", markup=False, soft_wrap=True)
    console.print("\nshares")
    console.print(_shares(document, fancy=fancy))
    # A problem may hold a list in brackets, which rich would read as markup.
    for name, problem in document["problems"].items():
        console.print(f"{name}: {problem}", markup=False, soft_wrap=True)
    console.print("files: " + ", ".join(document["files"]), markup=False, soft_wrap=True)


def _minimized(document: Mapping[str, Any]) -> str:
    weights = document["weights"]
    kind = "largest weighted" if document["minimax"] else "weighted mean"
    if len(set(weights.values())) == 1 and not document["minimax"]:
        kind = "mean"
    names = list(weights)
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{kind} over {some}"


def _judgment_table(judged: Mapping[str, Any], *, fancy: bool) -> Table:
    from raymix.report.formatting import fixed, percent

    table = plain_table(
        "",
        "unseen: R2",
        "rank corr.",
        "rel. error",
        "last step alone: R2",
        "rank corr.",
        "later: rel. error",
        fancy=fancy,
    )
    claims = judged["claims"]
    later = f"< {percent(claims['ahead_mre'])}"
    # What its authors claim stands above what was measured, in the same columns.
    table.add_row("BiMix as published", f"> {claims['unseen_r2']}", "", "", "", "", later)
    nothing: dict[str, None] = {"r2": None, "spearman": None, "mre": None}
    for name, row in judged["laws"].items():
        scores = [row[key] or nothing for key in ("unseen", "unseen_last", "ahead")]
        table.add_row(name, *_cells(scores[0], scores[1]), percent(scores[2]["mre"]))
    for name, score in judged["nulls"].items():
        last = judged["nulls_last"].get(name) or nothing
        table.add_row(f"null model: {name}", *_cells(score, last), fixed(None, 3))
    return table


def _cells(every: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    from raymix.report.formatting import fixed, percent

    first = [fixed(every["r2"], 3), fixed(every["spearman"], 3), percent(every["mre"])]
    return [*first, fixed(last["r2"], 3), fixed(last["spearman"], 3)]


def _verified(document: Mapping[str, Any], *, fancy: bool) -> Table:
    from raymix.report.formatting import difference, percent, prediction, with_spread

    names = ("mixture", "predicted", "measured", "error", "to uniform", "to proportional")
    table = plain_table(*names, fancy=fancy)
    for role, row in document["verified"].items():
        name = f"{role} ({row['mixture']})" if row["mixture"].startswith("mix-") else role
        against = [difference(row["against"].get(b)) for b in ("uniform", "proportional")]
        measured = with_spread(row["measured"])
        table.add_row(name, prediction(row["predicted"]), measured, percent(row["error"]), *against)
    return table


def _shares(document: Mapping[str, Any], *, fancy: bool) -> Table:
    roles = document["verified"]
    table = plain_table("domain", *roles, fancy=fancy)
    for name in document["domains"][:_MAX_DOMAINS_SHOWN]:
        table.add_row(name, *(f"{100 * row['shares'][name]:.1f} %" for row in roles.values()))
    if len(document["domains"]) > _MAX_DOMAINS_SHOWN:
        table.add_row(f"... {len(document['domains']) - _MAX_DOMAINS_SHOWN} more in the files")
    return table
