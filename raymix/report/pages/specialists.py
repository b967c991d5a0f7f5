"""The page of merged specialists, drawn from its document and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymix.report.figures.specialists import specialist_charts
from raymix.report.figures.theme import require_matplotlib
from raymix.report.formatting import (
    difference,
    percent_with_spread,
    scale_range,
    with_spread,
)
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

_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
_MODEL_COLUMNS = (
    "model", "loss at scale 1", "recovered", "best scale", "loss there", "recovered", "to joint"
)  # fmt: skip


def specialists_page(document: Document) -> str:
    """Return the page as HTML: models, differences, loss by scale, domains, specialists.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    several = len(document["merges"]) > 1
    return render(
        "specialists",
        title=f"{document['name']}: {len(document['domains'])} specialists merged",
        facts=_facts(document),
        page_legend=[],
        models=_models(document),
        figures=specialist_charts(document),
        tables=[
            *([_differences(document)] if several else []),
            _domains(document),
            _forgetting(document),
        ],
        failures=[f"{name}: {problem}" for name, problem in document["problems"].items()],
    )


def _facts(document: Document) -> str:
    base = (
        f"base {document['base']}"
        if document["base"]
        else f"base trained on {document['base_tokens']:,} tokens"
    )
    rows = document["held_out"]
    shared = ", ".join(rows["shared"])
    note = f"; all held-out text of {shared} is one document, which test and search rows share"
    return (
        f"{document['parameters']:,} parameters; seeds {', '.join(map(str, document['seeds']))}; "
        f"{base}; specialists {document['tokens']:,} tokens each; joint "
        f"{document['joint_tokens']:,} tokens of all domains; losses on the first "
        f"{rows['test_rows']} held-out rows of each domain, scales chosen on at most "
        f"{rows['search_rows']} others; corpus {document['corpus_fingerprint'][:12]}"
        f"{note if shared else ''}"
    )


def _models(document: Document) -> DataTable:
    rows: list[TableRow] = []
    for name, row in document["rows"].items():
        to_joint = "" if name == "joint" else difference(row["to_joint"])
        losses = [with_spread(row["mean"]), percent_with_spread(row["recovered"])]
        rows.append(text_row(name, [*losses, "", "", "", to_joint]))
    # References take no part: the specialists' own losses are the lowest by construction.
    lowest = {
        at: min((row[at]["mean"]["mean"] for row in document["merges"].values()), default=None)
        for at in ("given", "best")
    }
    for name, row in document["merges"].items():
        given, best = row["given"], row["best"]
        cells = [
            best_cell(with_spread(given["mean"]), best=given["mean"]["mean"] == lowest["given"]),
            TableCell(percent_with_spread(given["recovered"])),
            TableCell(scale_range(row["scale"])),
            best_cell(with_spread(best["mean"]), best=best["mean"]["mean"] == lowest["best"]),
            TableCell(percent_with_spread(best["recovered"])),
            TableCell(difference(best["to_joint"])),
        ]
        rows.append(TableRow(TableHead(name), cells))
    note = (
        f"Held-out loss in nats per token, mean over domains: mean {_PLUS_MINUS} sample standard "
        "deviation over seeds. Specialists: every domain by its own. Recovered: of the way from "
        "the base to the specialists. To joint: each seed to itself, with Student's 95 % interval. "
        "The lowest of the merges in bold, which is not to say that it is better."
    )
    heads = [TableHead(label) for label in _MODEL_COLUMNS]
    return DataTable(title="Merged models", heads=heads, rows=rows, note=note)


def _differences(document: Document) -> DataTable:
    """Return the table of paired differences between methods, at the best scale of each."""
    merges = list(document["merges"])
    best = document["differences"]["best"]
    rows: list[TableRow] = []
    for name in merges:
        paired = [best[name].get(other) for other in merges]
        # Means alone: with intervals the table would not fit beside more than two methods.
        texts = [None if p is None else f"{p['mean']:+.3f}" for p in paired]
        cells = [difference_cell(p, text) for p, text in zip(paired, texts, strict=True)]
        rows.append(TableRow(TableHead(name), cells))
    note = (
        "Row minus column at each one's best scale, nats per token: mean over seeds of the mean "
        "loss, each seed to itself; colored where Student's 95 % interval leaves out 0. Among so "
        "many some do by chance."
    )
    heads = [TableHead("method"), *map(TableHead, merges)]
    return DataTable(title="Method against method", heads=heads, rows=rows, note=note)


def _domains(document: Document) -> DataTable:
    domains = document["domains"]
    models = document["rows"] | {name: row["best"] for name, row in document["merges"].items()}
    return DataTable(
        title="By domain",
        heads=[TableHead("model"), *map(TableHead, domains)],
        rows=[
            text_row(name, [with_spread(row["domains"][domain]) for domain in domains])
            for name, row in models.items()
        ],
        note="Nats per token; merges at their best scale.",
    )


def _forgetting(document: Document) -> DataTable:
    domains, matrix = document["domains"], document["matrix"]
    return DataTable(
        title="Forgetting of the specialists",
        heads=[TableHead("specialist"), *map(TableHead, domains)],
        rows=[
            text_row(name, [f"{matrix[name][other]:.4f}" for other in domains]) for name in domains
        ],
        note="Row: the specialist. Column: the domain it is scored on. Mean over seeds.",
    )
