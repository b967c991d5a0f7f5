"""The page of a comparison of mixers, drawn from its document and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raymix.report.figures.comparison import (
    MAX_PANELS,
    MEASURES,
    domain_panels,
    loss_charts,
    measures_of,
    mixer_series,
)
from raymix.report.figures.theme import require_matplotlib
from raymix.report.formatting import percent, with_spread
from raymix.report.pages.render import render
from raymix.report.pages.tables import (
    DataTable,
    TableCell,
    TableHead,
    TableRow,
    best_cell,
    difference_cell,
)

Document = Mapping[str, Any]


def comparison_page(document: Document) -> str:
    """Return the page as HTML: tables, curves against tokens and operations, a panel per domain.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    left = len(document["domains"]) + len(document["targets"]) - MAX_PANELS
    rest = f" {left:,} further domains are in the table only." if left > 0 else ""
    return render(
        "comparison",
        title=f"{document['name']}: {len(document['mixers'])} mixers compared",
        facts=_facts(document),
        page_legend=mixer_series(document),
        summary=_summary(document),
        differences=_differences(document),
        figures=loss_charts(document),
        domains=_domains(document),
        domain_panels=domain_panels(document),
        panels_note=(
            "Operations of training and measuring together; mean over seeds, band from least to "
            f"most.{rest}"
        ),
        failures=[
            f"{run['mixer']}, seed {run['seed']}: {run['problem'] or ''}"
            for run in document["runs"]
            if run["state"] != "done"
        ],
    )


def _facts(document: Document) -> str:
    targets = document["targets"]
    words = [
        f"{document['parameters']:,} parameters",
        f"{document['tokens']:,} tokens in {document['steps']:,} steps",
        f"seeds {', '.join(map(str, document['seeds']))}",
        f"corpus {document['corpus_fingerprint'][:12]}",
    ]
    return "; ".join([*words, *([f"never trained on: {', '.join(targets)}"] if targets else [])])


def _summary(document: Document) -> DataTable:
    """Return the table of mixers: final losses with their spread, and the extra compute."""
    measures, mixers = measures_of(document), document["mixers"]
    # By exact value, before rounding makes ties.
    best = {m: _lowest(row[m]["mean"] for row in mixers.values()) for m in measures}
    heads = [
        TableHead("mixer"),
        TableHead("runs"),
        *(TableHead(MEASURES[m], "nats per token") for m in measures),
        TableHead("extra compute", "% of training operations"),
    ]
    rows: list[TableRow] = []
    for series, row in zip(mixer_series(document), mixers.values(), strict=True):
        losses = [best_cell(with_spread(row[m]), best=row[m]["mean"] == best[m]) for m in measures]
        runs = TableCell(f"{row['runs']} of {row['planned']}")
        cost = TableCell(percent(row["extra"]["flops_share"]["mean"]))
        rows.append(TableRow(TableHead(series.label, series=series), [runs, *losses, cost]))
    note = (
        "Held-out loss after the last step: mean \N{PLUS-MINUS SIGN} sample standard deviation "
        "over seeds; the lowest in bold, which is not to say that it is better."
    )
    return DataTable(title="Held-out loss and what it cost", heads=heads, rows=rows, note=note)


def _differences(document: Document) -> DataTable:
    """Return the table of paired differences to the baseline."""
    measures, mixers, base = measures_of(document), document["mixers"], document["baseline"]
    rows = [
        TableRow(
            TableHead(series.label, series=series),
            [difference_cell(row[m]["difference"]) for m in measures],
        )
        for series, (name, row) in zip(mixer_series(document), mixers.items(), strict=True)
        if name != base
    ]
    note = (
        f"Mean of (mixer minus {base}) over seeds, each seed against itself, with Student's 95 % "
        "interval of that one comparison; colored where it leaves out 0. With many comparisons "
        "some do so by chance."
    )
    return DataTable(
        title=f"Against {base}, nats per token",
        heads=[TableHead("mixer"), *(TableHead(MEASURES[m]) for m in measures)],
        rows=rows,
        note=note,
    )


def _domains(document: Document) -> DataTable:
    mixers = document["mixers"]
    rows: list[TableRow] = []
    for domain in [*document["domains"], *document["targets"]]:
        losses = [row["domains"][domain] for row in mixers.values()]
        best = _lowest(loss["mean"] for loss in losses)
        cells = [best_cell(with_spread(loss), best=loss["mean"] == best) for loss in losses]
        suffix = " (target)" if domain in document["targets"] else ""
        rows.append(TableRow(TableHead(f"{domain}{suffix}"), cells))
    heads = [TableHead(series.label, series=series) for series in mixer_series(document)]
    return DataTable(
        title="Held-out loss per domain",
        heads=[TableHead("domain"), *heads],
        rows=rows,
        note="Nats per token, mean \N{PLUS-MINUS SIGN} sample standard deviation over seeds.",
    )


def _lowest(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
