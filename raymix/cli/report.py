"""`raymix report`: draw runs as one HTML page."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymix.cli._run import Json, run_command


def command(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run directories or URLs, or that of a search."),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="The page, *.html, or a directory for it."),
    ] = None,
    json: Json = False,
) -> None:
    """Draw a run's weights, losses and throughput as one HTML page.

    The page needs no network and reads on a phone; a JSON file beside it holds the data of every
    table and picture. Several runs are drawn side by side. Runs that still go on are fine.
    """

    def work() -> dict[str, Any]:
        from raymix.report import write_report

        page = write_report(runs, out)
        data = page.with_suffix(".json")
        print(f"Wrote {page} and {data}.")
        return {"report": str(page), "data": str(data)}

    run_command(work, json=json)
