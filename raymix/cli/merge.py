"""`raymix merge`: one model from several, by DRM and its peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raymix.cli._run import Json, SetOverrides, run_command

if TYPE_CHECKING:
    from collections.abc import Callable


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
    """

    def work() -> dict[str, Any]:
        from raymix.merge.engine import merge, return_freed_memory, shown_bytes

        return_freed_memory()
        document = merge(
            source,
            out,
            overrides=[*(overrides or ()), *(set_overrides or ())],
            on=on,
            workers=workers,
            device=device,
            memory_bytes=None if memory is None else int(memory * 1e9),
            progress=_progress(),
        )
        document["plot"] = _drawn(document["out"]) if plot else None
        for note in document["notes"]:
            print(f"note: {note}")
        print(
            f"{document['out']}: {document['tensors']} tensors by {document['method']} in "
            f"{document['seconds']:.1f} s, {shown_bytes(document['peak_bytes'])} of memory at most"
        )
        return document

    run_command(work, json=json)


def _drawn(out: str) -> str | None:
    """Draw the report where matplotlib is installed; return the picture's path."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        print("no plot: run `pip install raymix[plots]` for one")
        return None
    from raymix.report.merging import draw_merge

    return str(draw_merge(out))


def _progress() -> Callable[[int, int, str], None] | None:
    """Return what shows the work on a terminal, and nothing elsewhere."""
    import sys

    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int, job: str) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} {job[-60:]:60}", end=end, file=sys.stderr, flush=True)

    return show
