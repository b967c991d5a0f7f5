"""`raymix watch`: a run live in the terminal, from its files.

Every loss stands beside its label, the one that `raymix report` has for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import Json, plain_table, run_command

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from raymix.report.data.live import LiveRun

_MAX_DOMAINS = 40
_BAR_CHARACTERS = 10
_CURVE_CHARACTERS = 60
# Without a terminal rich assumes 80 columns, which would cut the table of domains.
_PIPE_COLUMNS = 148
_BLOCKS = "▁▂▃▄▅▆▇█"


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory or its URL.")],
    every: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands, and end.")] = False,
    json: Json = False,
) -> None:
    """Show a run while it goes on: shares, tokens and epochs, losses, gradient signals, waiting.

    Reads only the run's files, so it works on any machine that sees them, and ends when the run
    has finished; Ctrl-C ends it before and leaves the run alone. Without a terminal it prints a
    line now and then. With --json: how the run stands, once.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console

        from raymix.report.data.live import LiveRun

        live, console = LiveRun(run), Console(highlight=False)
        live.poll()
        # --json is one document, so it cannot go on until the run ends.
        if once or json:
            if not console.is_terminal:
                console.width = _PIPE_COLUMNS
            console.print(dashboard(live.document(), fancy=console.is_terminal))
        elif console.is_terminal:
            _live(live, console, every)
        else:
            _lines(live, every)
        return live.document()

    run_command(work, json=json)


def _live(run: LiveRun, console: Console, every: float) -> None:
    from rich.live import Live

    # rich would redraw four times a second, though the files were not read again.
    with Live(console=console, auto_refresh=False) as screen:
        while True:
            screen.update(dashboard(run.document(), fancy=True), refresh=True)
            # Checked after drawing, so that the last state stays on the screen.
            if run.finished:
                return
            time.sleep(every)
            run.poll()


def _lines(run: LiveRun, every: float) -> None:
    shown = ""
    while True:
        text = headline(run.document())
        # Only what changed: a log needs no equal line every second.
        if text != shown:
            print(text, flush=True)
            shown = text
        if run.finished:
            return
        time.sleep(every)
        run.poll()


def headline(document: Mapping[str, Any]) -> str:
    """Return the state of a run as one line."""
    from raymix._utils.formatting import clock, short

    if not document["tokens"]:
        return f"{document['name']}: {document['state']}"
    of = f"/{document['steps']:,}" if document["steps"] else ""
    parts = [f"{document['name']}: {document['state']}", f"step {document['step']:,}{of}"]
    if document["loss"] is not None:
        parts.append(f"training loss {document['loss']:.4f}")
    # A mean of one step would repeat the loss before it.
    if document["loss_mean"] is not None and document["loss_mean_steps"] > 1:
        parts.append(f"mean of last {document['loss_mean_steps']} {document['loss_mean']:.4f}")
    if document["tokens_per_s"] is not None:
        parts.append(f"{short(document['tokens_per_s'])} tok/s")
    if document["data_wait"] is not None:
        parts.append(f"waiting for data {100 * document['data_wait']:.1f}%")
    if document["state"] == "running" and document["seconds_left"] is not None:
        parts.append(f"{clock(document['seconds_left'])} to go")
    if document["state"] == "silent":
        parts.append(f"no new line for {clock(document['silent_s'])}")
    return "  ".join(parts)


def dashboard(document: Mapping[str, Any], *, fancy: bool) -> RenderableType:
    """Return the state of a run as rich draws it: headline, loss curve, a row per domain."""
    from rich.console import Group
    from rich.text import Text

    from raymix.report.data.losses import RECENT_STEPS

    parts: list[RenderableType] = [Text(headline(document), style="bold" if fancy else "")]
    curve = [value for value in document["loss_curve"] if value is not None]
    if len(curve) > 1:
        ends = f"{curve[0]:.4f} to {curve[-1]:.4f}"
        line = sparkline(curve, _CURVE_CHARACTERS)
        parts.append(Text(f"training loss  {line}  {ends}, mean of last {RECENT_STEPS} steps"))
    if document["domains"]:
        parts += [Text(""), _table(document["domains"], fancy=fancy)]
        parts.append(Text(f"\n{_legend(document)}", style="dim" if fancy else ""))
    return Group(*parts)


def sparkline(values: list[float], width: int) -> str:
    """Return `values` as at most `width` block characters, the highest value the tallest."""
    shown = [values[at * len(values) // width] for at in range(min(width, len(values)))]
    if len(values) > width:
        # The newest value is printed beside the curve: it must be its end, too.
        shown[-1] = values[-1]
    low, high = min(shown), max(shown)
    # A flat curve has no range to divide by.
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in shown)


def _table(domains: Mapping[str, Mapping[str, Any]], *, fancy: bool) -> Table:
    rows = list(domains.items())
    signals = any(row["grad_norm2"] is not None for _, row in rows)
    # Short, as rich cuts columns off where a terminal is narrow: the legend says the rest.
    heads = ["domain", "now", "", "asked", "read", "tokens", "epochs"]
    heads += ["train loss", "held out", "before"]
    table = plain_table(*heads, *(["grad²", "noise"] if signals else []), fancy=fancy)
    # Bars can be compared only from a common left edge.
    table.columns[2].justify = "left"
    rows.sort(key=lambda item: -(item[1]["share_asked"] or 0.0))
    for name, row in rows[:_MAX_DOMAINS]:
        share = row["share_asked"] or 0.0
        cells = [name, _percent(row["share_asked"]), "█" * round(_BAR_CHARACTERS * share)]
        cells += [_percent(row["share_asked_mean"]), _percent(row["share_realised"])]
        cells += [f"{row['tokens']:,}", _fixed(row["epochs"], 2)]
        cells += [_fixed(row[key], 3) for key in ("loss_mean", "heldout_last", "heldout_first")]
        if signals:
            cells += [_short(row["grad_norm2"]), _short(row["grad_noise"])]
        table.add_row(*cells)
    if len(rows) > _MAX_DOMAINS:
        table.add_row(f"{len(rows) - _MAX_DOMAINS} more")
    return table


def _legend(document: Mapping[str, Any]) -> str:
    """Return a line that says which quantities the columns hold."""
    from raymix.report.data.losses import RECENT_STEPS

    step = document["heldout_step"]
    scored = "" if step is None else f" after step {step:,}, and before"
    return (
        f"Losses, nats per token: training loss, mean of a domain's last {RECENT_STEPS} steps; "
        f"held-out loss{scored}.\n"
        "Shares: asked now; asked and read, over the run."
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
