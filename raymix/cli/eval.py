"""`raymix eval`: held-out loss of a checkpoint by domain."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymix.cli._run import Json, run_command


def command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run or a checkpoint: directory or URL."),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Take corpus and sequence length from this recipe, not from the run's own.",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Rows per domain. Default: eval.rows_per_domain.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Score a run's newest checkpoint on the held-out text of every domain.

    Runs in this process, on a GPU where there is one. Losses are in nats per token.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console
        from rich.table import Table

        from raymix.cli._run import load
        from raymix.training.evaluate.score import score

        document = score(run, recipe=load(recipe) if recipe else None, rows_per_domain=rows)
        table = Table(box=None, pad_edge=False)
        for number, head in enumerate(("domain", "tokens", "loss", "bits/byte")):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for name, row in document["domains"].items():
            bits = row["bits_per_byte"]
            bits_text = "-" if bits is None else f"{bits:.4f}"
            table.add_row(name, f"{row['tokens']:,}", f"{row['loss']:.4f}", bits_text)
        console = Console(highlight=False)
        console.print(table)
        # Not wrapped: the path of the checkpoint is there to be copied.
        console.print(
            f"mean loss {document['mean']:.4f} of {document['checkpoint']}", soft_wrap=True
        )
        return document

    run_command(work, json=json)
