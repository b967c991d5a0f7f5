"""`raymix fit`: a law from a mixture table, and how far to trust it."""

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
    from raymix.laws import FitReport, Score


def command(
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="CSV or Parquet: run, step (optional), share.<domain> and loss.<target> columns.",
        ),
    ],
    *,
    law: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="bimix, exponential, additive, joint, gp, regression, lightgbm, or auto: the one "
            "that predicts runs left out best.",
        ),
    ] = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Losses to predict, separated by commas; else all."),
    ] = None,
    holdout: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="A table of other runs to be judged on."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only rows with this value, e.g. size=70M."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where the fitted law goes, for `raymix optimize`."),
    ] = None,
    json: Json = False,
) -> None:
    """Fit a mixing law to a table of runs, and say how far it can be trusted.

    Scores are of runs left out, or of the holdout where one is given: rank correlation, R2 and
    mean relative error, beside models that know less. With several steps per run, also of later
    steps predicted from the earlier ones.
    """
    # Both `--target a,b` and `--target a --target b` are common; they mean the same here.
    targets = [name for part in target or [] for name in part.split(",") if name]

    def work() -> dict[str, Any]:
        return _fit(table, law=law, targets=targets, holdout=holdout, where=where or [], out=out)

    run_command(work, json=json)


def _fit(
    table: str,
    *,
    law: str,
    targets: list[str],
    holdout: str | None,
    where: Sequence[str],
    out: str | None,
) -> dict[str, Any]:
    """Return the document of a fit, saved to `out` and shown to people."""
    from raymix.laws import fit_law, read_table, save_law

    # Before the tables are read, so that a mistake in --where costs no time.
    conditions = _where(where)
    fitted, report = fit_law(read_table(table, where=conditions), law=law, targets=targets or None)
    document = report.document()
    if holdout is not None:
        # --where holds for both tables: a law of one size is not judged on runs of another.
        document |= _score_holdout(fitted, read_table(holdout, where=conditions), holdout)
    document["judged_on"] = "runs left out" if holdout is None else holdout
    # Saved before it is drawn: a closed pipe must not cost the fit.
    if out is not None:
        save_law(out, fitted, report)
        document["out"] = out
    _draw(report, document)
    return document


def _where(given: Sequence[str]) -> dict[str, str]:
    from raymix.errors import LawError

    conditions: dict[str, str] = {}
    for text in given:
        # The first `=` separates: a value may hold another one.
        column, equals, value = text.partition("=")
        if not (column and equals):
            raise LawError.at("--where", text, "not of the form COLUMN=VALUE")
        conditions[column] = value
    return conditions


def _score_holdout(fitted: Any, holdout_table: Any, name: str) -> dict[str, Any]:
    """Return the scores of a law on another table, in JSON types."""
    from raymix.errors import LawError
    from raymix.laws import mean_score, scores

    # As sets, since order is no fault: the columns are put into the law's order below.
    if set(holdout_table.domains) != set(fitted.domains):
        # Both directions: a domain too many is as wrong as a missing one.
        missing = sorted(set(fitted.domains) ^ set(holdout_table.domains))
        raise LawError.at(
            "--holdout",
            name,
            f"other domains than the table: {', '.join(missing[:5])}",
            fix="Give it the same share columns",
        )
    holdout_table = holdout_table.with_targets(fitted.targets)
    at = [holdout_table.domains.index(domain) for domain in fitted.domains]
    by_target = scores(
        holdout_table, fitted.predict(holdout_table.share_RD[:, at], holdout_table.step_R)
    )
    return {
        "targets": {target: score.document() for target, score in by_target.items()},
        "mean": mean_score(by_target).document(),
    }


def _draw(report: FitReport, document: Mapping[str, Any]) -> None:
    """Print the scores for people."""
    from rich.console import Console

    console = Console(highlight=False)
    fancy = console.is_terminal
    if not fancy:
        # rich assumes 80 columns without a terminal and would cut the table.
        console.width = 120

    def table(first: str, rows: Mapping[str, Sequence[str]]) -> None:
        drawn = plain_table(first, "rank corr.", "R2", "error %", fancy=fancy)
        for name, cells in rows.items():
            drawn.add_row(name, *cells)
        console.print(drawn)

    console.print(
        f"law {report.law}, from {report.rows:,} rows of {report.runs:,} runs, in "
        f"{report.cpu_s:.1f} CPU seconds; judged on {document['judged_on']}",
        markup=False,
    )
    rows = {name: _cells(score) for name, score in document["targets"].items()}
    table("target", {**rows, "mean": _cells(document["mean"])})
    if report.ahead:
        ahead = {name: score.document() for name, score in report.ahead.items()}
        console.print("\nlater steps, from the first 60 % of them")
        table("target", {name: _cells(score) for name, score in ahead.items()})
    others: dict[str, Score] = {**report.candidates} or {report.law: report.mean}
    console.print("\nmean over targets, runs left out")
    nulls = {f"{name} (knows less)": score for name, score in report.nulls.items()}
    table("law", {name: _cells(s.document()) for name, s in {**others, **nulls}.items()})
    console.print(f"\n{report.verdict}", markup=False, soft_wrap=True)
    if "out" in document:
        console.print(f"Wrote {document['out']}.", markup=False, soft_wrap=True)


def _cells(score: Mapping[str, float | None]) -> list[str]:
    def cell(name: str, factor: float, digits: int) -> str:
        # Empty where a score is undefined, as any number would read as a result.
        value = score[name]
        return "" if value is None else f"{factor * value:.{digits}f}"

    return [cell("spearman", 1, 4), cell("r2", 1, 4), cell("mre", 100, 3)]
