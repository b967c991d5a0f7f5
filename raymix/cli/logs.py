"""`raymix logs`: the output of a job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymix.cli._run import Address, Json, TokenInClear, run_command
from raymix.cli.submit import exit_code, followed


def command(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job.")],
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job ends; end with its exit code.")
    ] = False,
    token_in_clear: TokenInClear = False,
    json: Json = False,
) -> None:
    """Print what a job has printed. With --json its log is in the document."""

    def work() -> dict[str, Any]:
        from raymix.jobs import JobServer

        server = JobServer(address, token_in_clear=token_in_clear)
        if follow:
            # Read again for the document: what was streamed has been printed, not stored.
            return followed(server, job).document | {"logs": server.logs(job)}
        text = server.logs(job)
        print(text, end="")
        return server.state(job).document | {"logs": text}

    # Printing the log of a job that failed is no failure; following it to its end is one.
    run_command(work, json=json, failed=exit_code if follow else lambda document: 0)
