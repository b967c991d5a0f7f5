"""`raymix status`: the state of a cluster's jobs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import Address, Json, TokenInClear, plain_table, run_command

if TYPE_CHECKING:
    from raymix.jobs import JobEnd


def command(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job; left out, all of them.")
    ] = None,
    address: Address = None,
    token_in_clear: TokenInClear = False,
    json: Json = False,
) -> None:
    """Say how a job stands: pending, running, stopped, succeeded or failed, and its exit code."""

    def work() -> dict[str, Any]:
        from raymix.jobs import JobServer

        server = JobServer(address, token_in_clear=token_in_clear)
        if job is not None:
            details = server.state(job)
            print(f"{details.job}: {details.status}" + _code(details))
            if details.message:
                print(details.message)
            return details.document
        jobs = server.jobs()
        _draw(jobs)
        return {"address": server.address, "jobs": [item.document for item in jobs]}

    # Asking has worked however the job stands, so a failed job ends with 0 here, too.
    run_command(work, json=json)


def _code(job: JobEnd) -> str:
    return "" if job.exit_code is None else f", exit code {job.exit_code}"


def _draw(jobs: list[JobEnd]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not jobs:
        console.print("no jobs")
        return
    # Names of jobs are long: the 80 columns that rich assumes for a pipe would cut them.
    if not console.is_terminal:
        console.width = 120
    table = plain_table("job", "status", "exit code", "started", fancy=console.is_terminal)
    for job in jobs:
        began = job.document["started"]
        # In the reader's own time zone; the document has seconds since 1970.
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)) if began else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(job.job, job.status.lower(), code, when)
    console.print(table)
