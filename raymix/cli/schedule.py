"""`raymix schedule`: simulated step times of all planners on given sequence lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raymix.cli._run import Json, Overrides, SetOverrides, load, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from raymix.schedule import Comparison, CostModel, Layout
    from raymix.schedule.layout import Ints

_COLUMNS = (
    ("over default", "speedup_over_default", "{:.2f}x"),
    ("over packed", "speedup_over_packed", "{:.2f}x"),
    ("of bound", "share_of_bound", "{:.1%}"),
    ("step, ms", "step_ms", "{:.4g}"),
    ("micro-steps", "micro_steps", "{:.1f}"),
    ("most tokens", "most_tokens", "{:,}"),
    ("violations", "memory_violations", "{}"),
    ("plan, ms", "plan_ms", "{:.1f}"),
)


# An argument and not subcommands: a file of commands holds one function.
Action = Annotated[
    Literal["simulate", "calibrate"],
    typer.Argument(
        metavar="simulate|calibrate",
        help="Plan batches and time them by a cost model; or measure one on the devices here.",
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|LENGTHS|MODEL",
        help="A recipe whose corpus is prepared; lengths in a .txt, .csv or .json file; or "
        "wikipedia, lmsys, chatqa2, llama3, magi, flexsp_wiki, longalign. To calibrate: a recipe, "
        "or 0.5b or 7b.",
    ),
]
Groups = Annotated[int, typer.Option(min=1, help="Data-parallel groups.")]
Context = Annotated[int, typer.Option(min=1, help="Ranks in each group.")]
# A text of commas, as Click has no option for a list in one word.
Widths = Annotated[
    str, typer.Option(metavar="N,N", help="Ranks a sequence may take; else one or a group.")
]
BarrierOption = Annotated[
    Literal["group", "all", "none"], typer.Option(help="Who waits for whom after a micro-step.")
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in a global batch.")]
Steps = Annotated[int, typer.Option(min=1, help="Batches to plan.")]
Seed = Annotated[int, typer.Option(help="Of the draw of batches.")]
Planners = Annotated[str, typer.Option(metavar="NAMES", help="Separated by commas; else all.")]
CostFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="A fitted cost model; else assumptions.")
]
ModelName = Annotated[str, typer.Option(help="Assumed model without --cost: 0.5b or 7b.")]
NetworkName = Annotated[str, typer.Option(help="Assumed network without --cost: nvlink or slow.")]
MemoryTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens a rank can hold; else the cost model's.")
]
Longest = Annotated[int | None, typer.Option(min=1, help="Cut longer sequences here.")]
Out = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Draw a page, *.html, its data beside; calibrate: write *.json."
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="calibrate: processes that gather; else the GPUs, or 2 on CPUs."),
]
Device = Annotated[str, typer.Option(help="calibrate: auto, cpu or cuda.")]
Seconds = Annotated[float, typer.Option(min=1, help="calibrate: about how long to measure.")]


def command(
    action: Action,
    source: Source,
    overrides: Overrides = None,
    *,
    set_overrides: SetOverrides = None,
    groups: Groups = 4,
    context: Context = 8,
    widths: Widths = "",
    barrier: BarrierOption = "group",
    batch: Batch = 256,
    steps: Steps = 3,
    seed: Seed = 0,
    planners: Planners = "",
    cost: CostFile = None,
    model: ModelName = "0.5b",
    network: NetworkName = "nvlink",
    memory_tokens: MemoryTokens = None,
    longest: Longest = None,
    out: Out = None,
    ranks: Ranks = None,
    device: Device = "auto",
    seconds: Seconds = 60.0,
    json: Json = False,
) -> None:
    """Compare planners of long and short sequences on a corpus' lengths, without a GPU.

    A batch's sequences sit on single ranks or are sharded over a group; each planner decides it
    its own way. Times are those of a cost model, fitted (--cost) or assumed: look at ratios.
    Sequences too long for a group are cut where the lengths are a published distribution's.
    `calibrate RECIPE|MODEL --out FILE.json` measures such a cost model on the devices at hand.
    """
    if action == "calibrate":
        from raymix.cli import calibrate

        changes = [*(overrides or ()), *(set_overrides or ())]
        asked = calibrate.CalibrateOptions(
            source, changes, out, ranks, device, seconds, longest, network
        )
        return run_command(lambda: calibrate.work(asked), json=json)

    def work() -> dict[str, Any]:
        from dataclasses import replace

        from rich.console import Console

        from raymix.schedule import Layout, compare_planners, load_cost_model, preset

        page = None if out is None else _page(out)
        chosen = load_cost_model(cost) if cost else preset(model, network)
        if memory_tokens is not None:
            chosen = replace(chosen, memory_tokens=memory_tokens)
        layout = Layout(groups, context, barrier=barrier, widths=_numbers(widths))
        changes = [*(overrides or ()), *(set_overrides or ())]
        lengths = _lengths(source, changes, layout, chosen, longest, seed)
        names = tuple(name.strip() for name in planners.split(",") if name.strip())
        comparison = compare_planners(
            lengths, layout, chosen, batch=batch, steps=steps, seed=seed, planners=names
        )
        document: dict[str, Any] = {"source": source, "files": [], **comparison.document()}
        if page is not None:
            # Written before it is drawn: a closed pipe must not cost the page.
            document["files"] = _write(document, comparison, page)
        _draw(document, Console(highlight=False))
        return document

    run_command(work, json=json)


def _numbers(text: str) -> tuple[int, ...]:
    from raymix.errors import ScheduleError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ScheduleError.at(
            "layout.widths", text, "not whole numbers, separated by commas"
        ) from error


def _lengths(
    source: str,
    changes: list[str],
    layout: Layout,
    cost: CostModel,
    longest: int | None,
    seed: int,
) -> Ints:
    """Return the lengths that a source stands for, cut at `longest`."""
    import numpy as np

    from raymix.errors import ScheduleError
    from raymix.schedule.length_source import known_source, read_lengths
    from raymix.schedule.lengths import known_distributions

    # The name of a file of lengths may hold a colon, too.
    recipe_like = source.endswith((".yaml", ".yml")) or ":" in source
    if recipe_like and not known_source(source):
        lengths = _corpus_lengths(source, changes)
    elif changes:
        # Refused, as an override that is ignored would mislead.
        raise ScheduleError.at("overrides", changes, "only a recipe has fields to change")
    else:
        lengths = read_lengths(source, seed=seed, note=lambda text: typer.echo(text, err=True))
    # Only published distributions: the user's own lengths are not cut unless --longest says so.
    if longest is None and source in known_distributions():
        longest = layout.context * cost.memory_tokens
    return np.minimum(lengths, longest) if longest is not None else lengths


def _corpus_lengths(source: str, changes: list[str]) -> Ints:
    """Return the tokens of every training document of a recipe's corpus, cut as training does."""
    import numpy as np

    from raymix.store import Corpus

    recipe = load(source, changes)
    corpus = Corpus.open(recipe.corpus.path)
    every = [corpus.document_lengths(name, "train") for name in corpus.domain_names]
    lengths = np.concatenate(every).astype(np.int64)
    return np.minimum(lengths[lengths > 0], recipe.data.sequence_length)


def _page(out: str) -> Path:
    """Return the path of the page, if one can be drawn there: before any work is done."""
    from pathlib import Path

    from raymix.errors import ScheduleError
    from raymix.report.figures.theme import require_matplotlib

    page = Path(out)
    if page.suffix not in {".html", ".htm"}:
        raise ScheduleError.at("out", out, "not an HTML file", fix="Give a name that ends in .html")
    if not page.parent.is_dir():
        raise ScheduleError.at("out", out, "its directory does not exist")
    require_matplotlib()
    return page


def _write(document: Mapping[str, Any], comparison: Comparison, page: Path) -> list[str]:
    """Write the page and its data; return their paths."""
    import json as json_module

    from raymix._utils.json import jsonable
    from raymix.report.pages.schedule import schedule_page
    from raymix.store import atomic_write_text

    data = page.with_suffix(".json")
    totals = comparison.totals.items()
    schedules = {name: total.last_schedule for name, total in totals if total.last_schedule}
    html = schedule_page(document, schedules, twin=data.name)
    # The data first: the page refers to it. NaN is no JSON, and browsers reject it.
    atomic_write_text(str(data), json_module.dumps(jsonable(document), allow_nan=False) + "\n")
    atomic_write_text(str(page), html)
    return [str(page), str(data)]


def _draw(document: Mapping[str, Any], console: Console) -> None:
    """Print the comparison for people."""
    from rich import box
    from rich.table import Table

    # rich assumes 80 columns without a terminal and would cut the table.
    if not console.is_terminal:
        console.width = 120
    layout, cost = document["layout"], document["cost"]
    console.print(
        f"\n{document['source']}: {document['steps']} batches of {document['sequences']:,} "
        f"sequences on {layout['groups']} x {layout['context']} ranks of "
        f"{cost['memory_tokens']:,} tokens; cost model: {cost['hardware'] or 'unnamed'}\n",
        markup=False,
        soft_wrap=True,
    )
    fancy = console.is_terminal
    table = Table(box=box.SIMPLE_HEAD if fancy else None, pad_edge=False, show_edge=False)
    for number, title in enumerate(("planner", *(column[0] for column in _COLUMNS))):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for name, row in document["planners"].items():
        # Steps are short, so people see milliseconds; the document keeps seconds.
        values = {**row, "step_ms": 1000 * row["step_s"]}
        table.add_row(name, *(form.format(values[key]) for _, key, form in _COLUMNS))
    console.print(table)
    for name, why in document["left_out"].items():
        console.print(f"{name} is left out: {why}", markup=False, soft_wrap=True)
    if document["files"]:
        console.print("files: " + ", ".join(document["files"]), markup=False, soft_wrap=True)
