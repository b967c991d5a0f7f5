"""`raymix optimize`: the best shares under a fitted law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import (
    Json,
    plain_table,
    run_command,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raymix.laws import Law, Objective, Optimum

_MAX_ROWS = 40
# With more domains many shares are so small that six digits leave few of them.
_MAX_COARSE_DOMAINS = 100

# Texts of NAME=NUMBER, as Click has no option type for a mapping.
Numbers = list[str] | None


Horizon = Annotated[
    float | None,
    typer.Option(metavar="STEPS", help="Steps to be best at; else the last of the table."),
]
Weight = Annotated[
    Numbers,
    typer.Option(
        metavar="TARGET=NUMBER",
        help="Weight of a target's loss; those not named count nothing. Else all alike.",
    ),
]
Minimax = Annotated[
    bool, typer.Option("--minimax", help="Minimize the worst weighted loss, not the sum.")
]
Floor = Annotated[Numbers, typer.Option(metavar="DOMAIN=SHARE", help="Least share of a domain.")]
Cap = Annotated[Numbers, typer.Option(metavar="DOMAIN=SHARE", help="Largest share of a domain.")]
MaxEpochs = Annotated[
    float | None, typer.Option(metavar="NUMBER", help="Read no domain more often than this.")
]
TotalTokens = Annotated[
    float | None,
    typer.Option(metavar="TOKENS", help="Tokens of the planned run, for --max-epochs."),
]
Available = Annotated[
    Numbers,
    typer.Option(metavar="DOMAIN=TOKENS", help="Tokens a domain holds, for --max-epochs."),
]
Prior = Annotated[
    str | None,
    typer.Option(metavar="SHARES", help="Shares to stay near to: uniform, or a=0.5,b=0.3,c=0.2."),
]
Kl = Annotated[
    float,
    typer.Option(
        metavar="NUMBER", help="Weight of KL(shares || prior) beside the loss, e.g. 0.05."
    ),
]
Out = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write the shares here as a mixer section, YAML or .json."),
]


def command(
    law: Annotated[str, typer.Argument(metavar="LAW", help="A law that `raymix fit` wrote.")],
    *,
    horizon: Horizon = None,
    weight: Weight = None,
    minimax: Minimax = False,
    floor: Floor = None,
    cap: Cap = None,
    max_epochs: MaxEpochs = None,
    total_tokens: TotalTokens = None,
    available: Available = None,
    prior: Prior = None,
    kl: Kl = 0.0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Find the shares with the least predicted loss, within limits.

    Options with NAME=NUMBER can be given many times. Says what proves the answer: for convex laws
    a gap that no other shares can beat, else how many of the starts agree. Prints a mixer section
    to paste into a recipe.
    """

    def work() -> dict[str, Any]:
        from rich.console import Console

        from raymix.laws import Objective, load_law

        fitted = load_law(law)
        objective = Objective(
            # None weighs all targets alike; an empty mapping would let none count.
            weights=_numbers("--weight", weight) or None,
            horizon=horizon,
            minimax=minimax,
            floors=_numbers("--floor", floor),
            caps=_numbers("--cap", cap),
            available_tokens=_numbers("--available", available),
            max_epochs=max_epochs,
            total_tokens=total_tokens,
            prior=_prior(prior, fitted.domains),
            kl=kl,
        )
        optimum = fitted.minimize(objective)
        document = _document(fitted, objective, optimum)
        if out is not None:
            # Written before it is drawn: a closed pipe must not cost the file.
            _write(out, document)
        draw(document, Console(highlight=False))
        return document

    run_command(work, json=json)


def _numbers(option: str, given: Sequence[str] | None) -> dict[str, float]:
    """Return names and numbers of an option given many times.

    Raises:
        LawError: If a part is not NAME=NUMBER or a name comes twice.
    """
    from raymix.errors import LawError

    values: dict[str, float] = {}
    for part in given or ():
        # The last `=` separates: a domain's name may hold one, a number cannot.
        name, _, text = part.rpartition("=")
        if name in values:
            raise LawError.at(option, part, f"{name!r} was given before", fix="Give it once")
        try:
            # Without a name `float("")` fails, so that one message serves both mistakes.
            values[name or part] = float(text if name else "")
        except ValueError:
            wrong, advice = "not NAME=NUMBER", f"Write e.g. {option} web=0.3"
            raise LawError.at(option, part, wrong, fix=advice) from None
    return values


def _prior(text: str | None, domains: Sequence[str]) -> dict[str, float] | None:
    if text is None:
        return None
    if text == "uniform":
        return dict.fromkeys(domains, 1 / len(domains))
    return _numbers("--prior", text.split(","))


def _document(fitted: Law, objective: Objective, optimum: Optimum) -> dict[str, Any]:
    """Return what `--json` says: the optimum, the shares it is compared to, the mixer section."""
    import numpy as np

    uniform = dict.fromkeys(fitted.domains, 1 / len(fitted.domains))
    shares = objective.prior or uniform
    share_RD = np.array([[shares.get(name, 0.0) for name in fitted.domains]])
    step_R = None if objective.horizon is None else np.array([objective.horizon])
    # A law may overflow far from the runs it was fitted to: the loss shows it, numpy need not warn.
    with np.errstate(all="ignore"):
        loss_V = fitted.predict(share_RD, step_R)[0]
    return {
        "law": fitted.kind,
        "horizon": objective.horizon,
        **optimum.document(),
        "reference": {
            "name": "uniform" if dict(shares) == uniform else "prior",
            "shares": dict(zip(fitted.domains, share_RD[0].tolist(), strict=True)),
            "losses": dict(zip(fitted.targets, loss_V.tolist(), strict=True)),
        },
        "most": dict(zip(fitted.domains, fitted.max_share_D.tolist(), strict=True)),
        "mixer": {"kind": "static", "weights": rounded(optimum.shares)},
    }


def rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """Return shares of few digits that sum to 1: the largest takes what rounding left."""
    digits = 6 if len(shares) <= _MAX_COARSE_DOMAINS else 9
    short = {name: round(share, digits) for name, share in shares.items()}
    largest = max(short, key=lambda name: short[name])
    others = sum(share for name, share in short.items() if name != largest)
    return short | {largest: round(1 - others, digits)}


def mixer_yaml(document: Mapping[str, Any]) -> str:
    """Return the mixer section of a recipe."""
    from raymix._utils.yaml import dump_yaml

    return dump_yaml({"mixer": document["mixer"]})


def _write(path: str, document: Mapping[str, Any]) -> None:
    import json as json_module

    from raymix.store import atomic_write_text

    section = {"mixer": document["mixer"]}
    is_json = path.endswith(".json")
    text = json_module.dumps(section, indent=2) + "\n" if is_json else mixer_yaml(document)
    atomic_write_text(path, text)


def draw(document: Mapping[str, Any], console: Console) -> None:
    """Print shares, losses, what supports them, and the mixer section."""
    if not console.is_terminal:
        console.width = 120
    fancy = console.is_terminal
    console.print(_shares(document, fancy=fancy))
    console.print()
    console.print(_losses(document, fancy=fancy))
    console.print()
    console.print(f"method      {_support(document)}", soft_wrap=True)
    for warning in document["warnings"]:
        # The color needs markup, so the text itself has to be escaped.
        console.print(f"[yellow]warning[/]     {_plain(warning)}", soft_wrap=True)
    console.print()
    # Neither markup nor wrapping: the section is there to be pasted, and YAML depends on its lines.
    console.print(mixer_yaml(document), markup=False, end="", soft_wrap=True)


def _plain(text: str) -> str:
    """Return text whose brackets rich does not take for markup."""
    from rich.markup import escape

    return escape(text)


def _shares(document: Mapping[str, Any], *, fancy: bool) -> Table:
    """Return the domains, largest share first, beside the shares they are compared to."""
    from raymix.cli.plan import percent

    reference = document["reference"]
    table = plain_table("domain", "share", reference["name"], "largest in a run", fancy=fancy)
    ranked = sorted(document["shares"].items(), key=lambda item: -item[1])
    for name, share in ranked[:_MAX_ROWS]:
        cells = (share, reference["shares"][name], document["most"][name])
        table.add_row(_plain(name), *map(percent, cells))
    rest = ranked[_MAX_ROWS:]
    if rest:
        # No largest share for the rest: each may be of another run, so a sum means nothing.
        before = sum(reference["shares"][name] for name, _ in rest)
        total = sum(share for _, share in rest)
        table.add_row(f"... {len(rest)} more", percent(total), percent(before))
    return table


def _losses(document: Mapping[str, Any], *, fancy: bool) -> Table:
    """Return the predicted losses, those that fall most first."""
    reference = document["reference"]
    table = plain_table(
        "predicted loss", "at these shares", f"at {reference['name']}", "difference", fancy=fancy
    )
    rows = [(name, loss, reference["losses"][name]) for name, loss in document["losses"].items()]
    rows.sort(key=lambda row: row[1] - row[2])
    for name, loss, before in rows[:_MAX_ROWS]:
        table.add_row(_plain(name), f"{loss:.4f}", f"{before:.4f}", f"{loss - before:+.4f}")
    if len(rows) > _MAX_ROWS:
        table.add_row(f"... {len(rows) - _MAX_ROWS} more")
    return table


def _support(document: Mapping[str, Any]) -> str:
    """Return what proves or supports the optimum, in words."""
    value, gap = document["value"], document["gap"]
    if gap is None:
        return (
            f"{document['restarts']} starts, {document['agreeing']} of them agree on the value "
            f"{value:.6g}; the law is not convex, so nothing is proved"
        )
    return (
        f"{document['method']}: value {value:.6g}; no allowed shares are better by over {gap:.1e}"
    )
