"""`raymix merge`: one model from several, by DRM and its peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raymix.cli._run import (
    Json,
    SetOverrides,
    load,
    plain_table,
    run_command,
    trial_processes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

_MAX_POINTS = 10
# Domains are columns here: more would not fit on a line.
_MAX_DOMAINS = 8

_TrialsOption = Annotated[
    int | None,
    typer.Option(min=1, help="With --search: merges to try; else 11, of two options 25."),
]

_EvalOption = Annotated[
    str | None,
    typer.Option("--eval", metavar="RECIPE", help="With --search: whose held-out text to use."),
]

_SearchOption = Annotated[
    str | None,
    typer.Option(
        metavar="OPTIONS",
        help="Choose numbers by held-out loss: scale, drop, ..., or NAME=LOW:HIGH, by commas.",
    ),
]


def command(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A merge file, mergekit's or raymix's YAML.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="FIELD=VALUE", help="Fields to change, e.g. parameters.drop=0.5."),
    ] = None,
    *,
    out: Annotated[str, typer.Option(metavar="DIR", help="A directory that is not there yet.")],
    set_overrides: SetOverrides = None,
    on: Annotated[
        Literal["local", "ray"],
        typer.Option(help="This machine, or a Ray task per parameter."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Parameters at a time; else one per core, or one on a GPU."),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    memory: Annotated[
        float | None,
        typer.Option(min=0, metavar="GB", help="Working memory; else a quarter of what is free."),
    ] = None,
    search: _SearchOption = None,
    evaluate: _EvalOption = None,
    trials: _TrialsOption = None,
    plot: Annotated[
        bool, typer.Option(help="Draw merge_report.svg; takes a second and a half.")
    ] = True,
    json: Json = False,
) -> None:
    """Merge models of one architecture, tensor by tensor, in memory of a few tensors.

    The file is YAML: merge_method, models and, where the method needs it, base_model; parameters
    hold for all tensors or by name and layer. A file for mergekit means the same here. Methods:
    drm, knots, tsv, iso_c, iso_cts, ties, dare_ties, dare_linear, della, breadcrumbs,
    task_arithmetic, linear, slerp, multislerp, model_stock. LoRA adapters without a base give an
    adapter. Running it again goes on where it stopped.

    With --search the merge is made at many values of its options, through Ray Tune, --workers at a
    time; the values of the least mean loss on held-out rows of RECIPE's corpus are written (of the
    domains in its section `specialists`, or all). Losses reported in the end are of other rows.
    `scale` is a factor of the merged delta; `drop`, the part of the entries pruned.
    """

    def work() -> dict[str, Any]:
        changes = [*(overrides or ()), *(set_overrides or ())]
        # --eval or --trials alone is a mistake to report, not to ignore.
        if search is not None or evaluate is not None or trials is not None:
            _refuse_options(search, evaluate, on, memory)
            how = {"search": search, "trials": trials, "workers": workers, "device": device}
            # `_refuse_options` has raised where `evaluate` is None; `str` is for the type checker.
            return _search(source, out, str(evaluate), changes, how, plot=plot)
        return _merge(
            source,
            out,
            plot=plot,
            overrides=changes,
            on=on,
            workers=workers,
            device=device,
            # A GB is 1e9 bytes, as in all output of raymix.
            memory_bytes=None if memory is None else int(memory * 1e9),
        )

    run_command(work, json=json)


def _merge(source: str, out: str, *, plot: bool, **how: Any) -> dict[str, Any]:
    """Return the document of one merge, shown to people; `how`: what `merge` takes."""
    from raymix.merging.run.engine import format_bytes, merge, return_freed_memory

    # Here and not in `merge`: it cannot be undone, and a caller may do more than merge.
    return_freed_memory()
    document = merge(source, out, progress=_progress(), **how)
    document["plot"] = _drawn(document["out"]) if plot else None
    for note in document["notes"]:
        print(f"note: {note}")
    print(
        f"{document['out']}: {document['tensors']} tensors by {document['method']} in "
        f"{document['seconds']:.1f} s, {format_bytes(document['peak_bytes'])} of memory at most"
    )
    return document


def _refuse_options(
    search: str | None, evaluate: str | None, on: str, memory: float | None
) -> None:
    """Raise MergeError for options that do not go together."""
    from raymix.errors import MergeError, format_problem

    # Collected, so that one attempt shows every option to change.
    problems: list[str] = []
    if search is None:
        problems.append(
            format_problem(
                "--search",
                None,
                "--eval and --trials are for a search",
                fix="Add e.g. --search scale,drop",
            )
        )
    if evaluate is None:
        wrong, advice = "a search needs held-out text to choose by", "Name a recipe"
        problems.append(format_problem("--eval", None, wrong, fix=advice))
    if on != "local":
        wrong, advice = "a search runs through Ray Tune already", "Leave --on out"
        problems.append(format_problem("--on", on, wrong, fix=advice))
    if memory is not None:
        wrong, advice = "a search shares the memory out by itself", "Use --workers for fewer"
        problems.append(format_problem("--memory", memory, wrong, fix=advice))
    if problems:
        raise MergeError(*problems)


def _search(
    source: str, out: str, recipe: str, changes: list[str], how: dict[str, Any], *, plot: bool
) -> dict[str, Any]:
    """Return the document of a search, shown to people; `how`: what `search_merge` takes."""
    from rich.console import Console

    # The overrides are for the merge file; the recipe is taken as it is written.
    loaded = load(recipe)
    with trial_processes(loaded):
        from raymix.tuning.merges.search import search_merge

        document = search_merge(source, out, recipe=loaded, overrides=changes, **how)
    document["merge"]["plot"] = _drawn(document["merge"]["out"]) if plot else None
    draw_search(document, Console(highlight=False))
    return document


def draw_search(document: Mapping[str, Any], console: Console) -> None:
    """Print a search for people: the best points, the losses on the test rows, the files."""
    if not console.is_terminal:
        # rich assumes 80 columns without a terminal and would cut the table.
        console.width = 140
    fancy, names = console.is_terminal, list(document["search"])
    console.print(f"\n{document['trials']} merges by {document['method']}, the best first")
    table = plain_table("point", *names, "loss to choose by", fancy=fancy)
    # A merge that failed has no loss to sort by.
    usable = [point for point in document["points"] if point["loss"] is not None]
    for point in sorted(usable, key=lambda p: p["loss"])[:_MAX_POINTS]:
        values = [f"{point['options'][name]:.4g}" for name in names]
        # Point 0 has the values of the file: what the search has to beat.
        given = "as given" if point["number"] == 0 else str(point["number"])
        table.add_row(given, *values, f"{point['loss']:.4f}")
    console.print(table)
    held_out = document["held_out"]
    console.print(
        f"\nheld-out loss, nats per token, on the first {held_out['test_rows']} rows of each "
        "domain; "
        f"none of the at most {held_out['search_rows']} rows chosen by is among them",
        soft_wrap=True,
    )
    domains = held_out["domains"][:_MAX_DOMAINS]
    table = plain_table("model", "mean", *domains, fancy=fancy)
    for name, row in document["test"].items():
        losses = [row["mean"], *(row["domains"].get(domain) for domain in domains)]
        table.add_row(name, *("-" if loss is None else f"{loss:.4f}" for loss in losses))
    console.print(table)
    if held_out["shared"]:
        note = (
            f"one document is all that is held out of {', '.join(held_out['shared'])}: both parts "
        )
        console.print(f"note: {note}are of it", markup=False, soft_wrap=True)
    if document["failed_points"]:
        console.print(f"{document['failed_points']} merges could not be made; see the files")
    chosen = ", ".join(f"{name} {value:.4g}" for name, value in document["best"].items())
    console.print(f"{document['merge']['out']}: {chosen}", markup=False, soft_wrap=True)
    console.print("files: " + ", ".join(document["files"]), markup=False, soft_wrap=True)


def _drawn(out: str) -> str | None:
    """Draw the report where matplotlib is installed; return the picture's path."""
    from importlib.util import find_spec

    # No error: the merge is written, and a missing picture is no reason for exit code 1.
    if find_spec("matplotlib") is None:
        print("no plot: run `pip install raymix[plots]` for one")
        return None
    from raymix.report.figures.merging import draw_merge

    return str(draw_merge(out))


def _progress() -> Callable[[int, int, str], None] | None:
    """Return what shows the work on a terminal, and nothing elsewhere."""
    import sys

    # A carriage return redraws the line on a terminal; in a log file every state would stay.
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int, job: str) -> None:
        end = "\n" if done == total else ""
        # Padded to a fixed width, which erases the rest of a longer line before it.
        print(f"\r{done}/{total} {job[-60:]:60}", end=end, file=sys.stderr, flush=True)

    return show
