"""`raymix submit`: run a command as a job of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import Address, Json, RecipeSource, TokenInClear, run_command

if TYPE_CHECKING:
    from raymix.jobs import JobEnd, JobServer, Submission
    from raymix.jobs.files import Listing

_MAX_NAMED = 5

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="List what would travel, and what not and why; send nothing."),
]


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
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Ship the project to a Ray cluster and run a raymix command there.

    The project travels without what .gitignore and .rayignore name and without files that may hold
    a secret (.env, .ssh/, *.pem, hf_token, ...); sources that the recipe gives relative to itself
    must be part of it. Results go to --storage or to absolute paths. With
    --follow the exit code is the job's; Ctrl-C leaves the job running. A token (RAY_AUTH_MODE=
    token) is sent over TLS or to this machine only.
    """

    def work() -> dict[str, Any]:
        from raymix.jobs import JobServer, prepare_submission

        submission = prepare_submission(
            name, recipe, arguments or (), project=project, storage=storage
        )
        if dry_run:
            return _show_listing(submission)
        # Before anything is sent: what is left out may be what the job needs.
        for path in submission.listing.left_out:
            print(f"left out: {path} (a link out of the project, or no file)")
        _show_secrets(submission.listing)
        # After all checks that need no cluster.
        server = JobServer(address, token_in_clear=token_in_clear)
        document = _submit(server, submission, follow=follow)
        return document | {"storage": storage}

    run_command(work, json=json, failed=exit_code)


def _show_secrets(listing: Listing) -> None:
    """Say in one line how many files stay here because they may hold a secret."""
    secret = listing.secrets
    if secret:
        size = sum((listing.root / name).stat().st_size for name in secret)
        more = ", ..." if len(secret) > _MAX_NAMED else ""
        print(
            f"stay here: {len(secret):,} files of {size / 1e3:,.1f} kB that may hold secrets: "
            f"{', '.join(secret[:_MAX_NAMED])}{more}"
        )


def _show_listing(submission: Submission) -> dict[str, Any]:
    """Print the files of a project, those that travel first; return the document."""
    listing = submission.listing
    for name in listing.files:
        print(f"travels   {name}  ({(listing.root / name).stat().st_size:,} bytes)")
    for names, why in (
        (listing.secrets, "may hold a secret"),
        (listing.ignored, "ignored"),
        (listing.left_out, "a link out of the project, or no file"),
    ):
        for name in names:
            print(f"stays     {name}  ({why})")
    size = listing.size_bytes
    print(f"project: {listing.root}, {len(listing.files):,} files, {size / 1e6:.1f} MB to travel")
    _show_secrets(listing)
    print("nothing was sent")
    return {
        "project": str(listing.root),
        "command": submission.entrypoint,
        "files": list(listing.files),
        "bytes": size,
        "secrets": list(listing.secrets),
        "ignored": list(listing.ignored),
        "left_out": list(listing.left_out),
        "exit_code": 0,
    }


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
        "secrets": list(listing.secrets),
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
