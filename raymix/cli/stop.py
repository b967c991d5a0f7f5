"""`raymix stop`: stop a job; a run writes a checkpoint first."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymix.cli._run import Address, Json, TokenInClear, run_command


def command(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job.")],
    address: Address = None,
    token_in_clear: TokenInClear = False,
    json: Json = False,
) -> None:
    """Stop a job, and wait until it has ended; a run writes a checkpoint first.

    Submitting the same command again goes on from there. A job that has ended stays as it is.
    """

    def work() -> dict[str, Any]:
        from raymix.jobs import JobServer

        ended = JobServer(address, token_in_clear=token_in_clear).stop(job)
        print(f"{ended.job}: {ended.status}")
        return ended.document

    # None means that it did not end in time; a job that failed by itself is no failure of stopping.
    run_command(work, json=json, failed=lambda document: document["exit_code"] is None)
