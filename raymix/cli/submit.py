"""`raymix submit`: run a command as a job of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import Address, Json, RecipeSource, TokenInClear, run_command

if TYPE_CHECKING:
    from raymix.jobs import JobEnd, JobServer, Submission


def command(
    name: Annotated[
        str,
        typer.Argument(metavar="COMMAND", help="validate, plan, prepare, train, compare or tune."),
    ],
    recipe: RecipeSource,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE",
            help="Fields to change; after `--`, options of COMMAND: -- --if-exists new.",
        ),
    ] = None,
    *,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print what the job prints; end with its exit code.")
    ] = False,
    project: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="What travels; else the nearest directory above the recipe with .git or a "
            "pyproject.toml.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="A directory that all nodes see, or a URL: relative results go there.",
        ),
    ] = None,
    token_in_clear: TokenInClear = False,
    json: Json = False,
) -> None:
    """Ship the project to a Ray cluster and run a raymix command there.

    The project travels without what .gitignore and .rayignore name; sources that the recipe gives
    relative to itself must be part of it. Results go to --storage or to absolute paths. With
    --follow the exit code is the job's; Ctrl-C leaves the job running. A token (RAY_AUTH_MODE=
    token) is sent over TLS or to this machine only.
    """

    def work() -> dict[str, Any]:
        from raymix.jobs import JobServer, prepare_submission

        submission = prepare_submission(
            name, recipe, arguments or (), project=project, storage=storage
        )
        # Before anything is sent: what is left out may be what the job needs.
        for path in submission.listing.left_out:
            print(f"left out: {path} (a link out of the project, or no file)")
        # After all checks that need no cluster.
        server = JobServer(address, token_in_clear=token_in_clear)
        document = _submit(server, submission, follow=follow)
        return document | {"storage": storage}

    run_command(work, json=json, failed=exit_code)


def _submit(server: JobServer, submission: Submission, *, follow: bool) -> dict[str, Any]:
    """Return the document of a job that is submitted, and followed to its end if `follow`."""
    size = server.submit(submission)
    listing = submission.listing
    print(f"project: {listing.root}, {len(listing.files):,} files, {size / 1e6:.1f} MB")
    # Flushed: stdout to a pipe is buffered, and the name is needed while the job runs.
    print(f"job: {submission.name} on {server.address}", flush=True)
    if follow:
        job = followed(server, submission.name)
    else:
        job = server.state(submission.name)
        print(f"raymix logs {submission.name} --follow shows it, raymix stop ends it")
    return {
        **job.document,
        "address": server.address,
        "project": str(listing.root),
        "files": len(listing.files),
        "package_bytes": size,
        "left_out": list(listing.left_out),
    }


def followed(server: JobServer, job: str) -> JobEnd:
    """Print what `job` prints until it has ended; return how. Ctrl-C leaves it running."""
    try:
        ended = server.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nThe job goes on: raymix logs {job} --follow, or raymix stop {job}.", flush=True)
        # `run_command` ends with 130, as the command was interrupted, though the job was not.
        raise
    print(f"job {job}: {ended.status}, exit code {ended.exit_code}")
    if ended.exit_code and ended.message:
        print(ended.message)
    return ended


def exit_code(document: Mapping[str, Any]) -> int:
    """Return the exit code of a job's document; 0 while it runs."""
    return document["exit_code"] or 0
