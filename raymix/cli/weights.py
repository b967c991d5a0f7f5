"""`raymix weights`: the mixture of a run, shown or changed while the run trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from raymix.cli._run import Json, plain_table, run_command

_MAX_DOMAINS = 40


def command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory, or the URL of a run of this machine."),
    ],
    shares: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DOMAIN=SHARE", help="New shares, summing to 1; a domain left out gets 0."
        ),
    ] = None,
    *,
    from_step: Annotated[
        int | None,
        typer.Option(min=0, metavar="STEP", help="Their first step; else the first not read yet."),
    ] = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Keep them whatever the mixer decides, until --release.")
    ] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Return to the mixer's own shares.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time limit of the run's answer.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Show the mixture of a run, or request new shares and wait until the run has taken them up.

    Works through the files of the run directory, whether the run trains in one process, on Ray or
    in a loop of your own. Under an adaptive mixer new shares last until its next window, unless
    they are to hold.
    """

    def work() -> dict[str, Any]:
        from raymix.training.run.control import connect

        wanted = _parse(shares or [])
        _check(wanted, from_step, hold=hold, release=release)
        control = connect(run, timeout_s=timeout)
        if not wanted and not release:
            document = control.weights()
            _show(document)
            return document
        if release:
            answer = control.release(from_step)
            print(f"the mixer's own shares from step {answer['first_step']:,} on")
        else:
            answer = control.set_weights(wanted, from_step, hold=hold)
            print(_taken_up(answer, hold=hold))
        return {"run": run, "shares": wanted or None, "hold": hold, **answer}

    run_command(work, json=json)


def _check(
    shares: Mapping[str, float], from_step: int | None, *, hold: bool, release: bool
) -> None:
    from raymix.errors import RecipeError

    if release and (shares or hold):
        raise RecipeError.at(
            "--release", True, "the mixer decides the shares then", fix="Give no shares and no hold"
        )
    if not shares and not release and (hold or from_step is not None):
        name, value = ("--hold", True) if hold else ("--from-step", from_step)
        raise RecipeError.at(name, value, "no shares are given", fix="Add DOMAIN=SHARE ...")


def _parse(words: Sequence[str]) -> dict[str, float]:
    """Return the shares in `DOMAIN=SHARE` words.

    Raises:
        RecipeError: If a word is none, or names a domain again.
    """
    from raymix.errors import RecipeError, format_problem

    shares: dict[str, float] = {}
    problems = []
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            share = float(number) if equals else math.nan
        except ValueError:
            share = math.nan
        if not math.isfinite(share):
            fix = "Write DOMAIN=SHARE, e.g. books=0.5"
            problems.append(format_problem("weights", word, "not a share", fix=fix))
            continue
        if name in shares:
            problems.append(format_problem(f"weights.{name}", share, "given twice"))
        shares[name] = share
    if problems:
        raise RecipeError(*problems)
    return shares


def _taken_up(answer: Mapping[str, Any], *, hold: bool) -> str:
    text = f"in force from step {answer['first_step']:,} on"
    if hold:
        return f"{text}, until `raymix weights RUN --release`"
    if answer["until"] is None:
        return text
    return f"{text}, until the mixer's next change, at step {answer['until']:,} at the earliest"


def _show(document: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if document["shares"] is None:
        console.print("no shares yet: the run has not read its first step", soft_wrap=True)
    else:
        by = document["by"] + (", held" if document["hold"] else "")
        console.print(f"since step {document['first_step']:,} by {by}", soft_wrap=True)
        table = plain_table("domain", "share", fancy=console.is_terminal)
        ranked = sorted(document["shares"].items(), key=lambda item: -item[1])
        for name, share in ranked[:_MAX_DOMAINS]:
            table.add_row(name, f"{100 * share:.2f}%")
        if len(ranked) > _MAX_DOMAINS:
            table.add_row(f"{len(ranked) - _MAX_DOMAINS} more")
        console.print(table)
    if document["in_work"] is False:
        console.print("the run is not in work")
    for request in document["to_come"]:
        shares = request["shares"]
        what = "the mixer's own shares"
        if shares is not None:
            what = " ".join(f"{name}={share:.4g}" for name, share in shares.items() if share)
        suffix = ", held" if request["hold"] else ""
        console.print(f"from step {request['first_step']:,}: {what}{suffix}", soft_wrap=True)
