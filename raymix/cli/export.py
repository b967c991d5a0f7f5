"""`raymix export`: a checkpoint as a Hugging Face model directory."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymix.cli._run import Json, run_command


def command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run or a checkpoint: directory or URL."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A directory that is not there yet.")],
    json: Json = False,
) -> None:
    """Write a run's newest checkpoint as a Hugging Face model directory with a card.

    It loads with AutoModelForCausalLM.from_pretrained(OUT). Nothing is overwritten.
    """

    def work() -> dict[str, Any]:
        from raymix.training.evaluate.export import export

        document = export(run, out)
        print(f"{document['out']}: {', '.join(document['files'])}")
        return document

    run_command(work, json=json)
