"""The page of a search for the best shares, drawn from its document and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymix.report.figures.theme import require_matplotlib
from raymix.report.figures.tuning import coefficient_panels, main_charts, slice_panels
from raymix.report.formatting import fixed, percent, prediction, with_spread
from raymix.report.pages.render import render
from raymix.report.pages.tables import (
    DataTable,
    TableCell,
    TableHead,
    TableRow,
    best_cell,
    difference_cell,
    text_row,
)

Document = Mapping[str, Any]

MAX_PANELS = 24
_BASELINES = ("uniform", "proportional")
_NO_SCORES: dict[str, None] = {"r2": None, "spearman": None, "mre": None}


def tuning_page(document: Document) -> str:
    """Return the page as HTML: verified mixtures, scores of the law, shares, slices.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    return render(
        "tuning",
        title=f"{document['name']}: shares found by {len(document['runs'])} small runs",
        facts=_facts(document),
        page_legend=[],
        verified=_verified(document),
        figures=main_charts(document),
        scores=_scores(document),
        slices=slice_panels(document)[:MAX_PANELS],
        coefficients=coefficient_panels(document)[:MAX_PANELS],
        runs=_runs(document),
        failures=[f"{name}: {problem}" for name, problem in document["problems"].items()],
    )


def _facts(document: Document) -> str:
    weights, seeds = document["weights"], document["seeds"]
    kind = "largest weighted loss" if document["minimax"] else "weighted loss"
    terms = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    words = [
        f"minimized: {kind} of {terms}",
        f"after {document['horizon']:,.0f} steps",
        f"small runs of {document['steps']:,} steps, {document['mode']}",
        f"law {document['law']}",
        f"verified on seeds {', '.join(map(str, seeds))}" if seeds else "not verified",
        f"corpus {document['corpus_fingerprint'][:12]}",
    ]
    return "; ".join(words)


def _verified(document: Document) -> DataTable:
    """Return the table of predictions beside measurements."""
    verified = document["verified"]
    means = [row["measured"]["mean"] for row in verified.values()]
    lowest = min((mean for mean in means if mean is not None), default=None)
    rows: list[TableRow] = []
    for role, row in verified.items():
        name = f"{role}, {row['mixture']}" if row["mixture"].startswith("mix-") else role
        outside = "" if row["allowed"] else " (outside the limits)"
        mean = row["measured"]["mean"]
        cells = [
            TableCell(prediction(row["predicted"])),
            best_cell(with_spread(row["measured"]), best=mean is not None and mean == lowest),
            TableCell(percent(row["error"])),
            *(difference_cell(row["against"].get(base)) for base in _BASELINES),
        ]
        rows.append(TableRow(TableHead(f"{name}{outside}"), cells))
    heads = ("mixture", "predicted", "measured", "error", "to uniform", "to proportional")
    note = (
        f"Nats per token after {document['steps']:,} steps. Predicted: with the 95 % interval that "
        "cross-validated errors of the law give. Measured: mean \N{PLUS-MINUS SIGN} sample "
        "standard deviation over seeds that the law has not seen; the lowest in bold. "
        "Differences: each seed against itself, with Student's 95 % interval, colored where it "
        "leaves out 0."
    )
    return DataTable(
        title="Predicted and measured", heads=list(map(TableHead, heads)), rows=rows, note=note
    )


def _scores(document: Document) -> DataTable:
    """Return the table of the law's scores beside BiMix's claims and null models."""
    judged = document["judged"]
    claims = judged["claims"]
    # The paper gives two numbers only; the other columns stay empty.
    claimed = [f"> {claims['unseen_r2']}", *[""] * 4, f"< {percent(claims['ahead_mre'])}"]
    rows = [text_row("BiMix as published", claimed)]
    for name, row in judged["laws"].items():
        every, last, ahead = (row[key] or _NO_SCORES for key in ("unseen", "unseen_last", "ahead"))
        rows.append(_score_row(name, every, last, ahead))
    for name, every in judged["nulls"].items():
        last = judged["nulls_last"].get(name) or _NO_SCORES
        rows.append(_score_row(f"null model: {name}", every, last, _NO_SCORES))
    heads = (
        "law",
        "unseen: R2",
        "rank correlation",
        "relative error",
        "last step alone: R2",
        "rank correlation",
        "later steps: relative error",
    )
    note = (
        f"{judged['verdict']} Mean over losses. Unseen: runs left out of the fit, all their "
        "steps; most of that variance is the training curve, which a law blind to the mixture "
        "predicts too, so the last step alone tells more. Later steps: predicted from the earlier "
        f"ones. The claims are those of {claims['paper']}, on other data and models."
    )
    return DataTable(
        title="What the law is worth", heads=list(map(TableHead, heads)), rows=rows, note=note
    )


def _score_row(name: str, every: Document, last: Document, ahead: Document) -> TableRow:
    cells = [
        *(fixed(every["r2"], 3), fixed(every["spearman"], 3), percent(every["mre"])),
        *(fixed(last["r2"], 3), fixed(last["spearman"], 3), percent(ahead["mre"])),
    ]
    return text_row(name, cells)


def _runs(document: Document) -> DataTable:
    """Return the table of the small runs, best first."""
    runs = sorted(
        # Runs without a value come last: None does not compare with numbers.
        document["runs"],
        key=lambda run: (run["value"] is None, run["value"] or 0.0, run["name"]),
    )
    rows = [
        text_row(
            run["name"],
            [run["origin"], _steps(run), fixed(run["value"], 4), fixed(run["predicted"], 4)],
        )
        for run in runs
    ]
    return DataTable(
        title="The small runs",
        heads=list(map(TableHead, ("run", "from", "steps", "measured", "fitted"))),
        rows=rows,
        note="The law was fitted to these; the shares of each are in mixtures.csv.",
    )


def _steps(run: Document) -> str:
    state = "" if run["state"] == "done" else f" ({run['state']})"
    return f"{run['step']:,}{state}"
