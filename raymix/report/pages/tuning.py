"""The page of a search for the best shares, drawn from its document and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from typing import Any

from raymix.report.figures.style import require_matplotlib
from raymix.report.pages.comparison import (
    cell,
    difference_text,
    figure_card,
    percent,
    table_card,
    with_spread,
)
from raymix.report.pages.run import whole_page

Document = Mapping[str, Any]

MOST_PANELS = 24
_BASELINES = ("uniform", "proportional")
_NONE = "\N{EN DASH}"
_NOTHING: dict[str, None] = {"r2": None, "spearman": None, "mre": None}


def tuning_page(document: Document) -> str:
    """Return the page as HTML: what was verified, what the law is worth, shares, slices.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    from raymix.report.figures import tuning as figures

    title = f"{document['name']}: shares found by {len(document['runs'])} small runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_facts(document))}</p>',
        _verified(document),
        *(figure_card(*drawn) for drawn in figures.main_figures(document)),
        _judged(document),
        _panels(
            "The loss as one share changes",
            "Predicted value after the small runs' steps, the other shares in proportion to the "
            "optimum's; the dot is the optimum.",
            figures.slice_panels(document)[:MOST_PANELS],
        ),
        _panels(
            "Coefficients of the law",
            "Value and 90 % interval of a bootstrap over runs.",
            figures.coefficient_panels(document)[:MOST_PANELS],
        ),
        _runs(document),
        _failures(document),
        f'<p class="quiet">raymix {escape(version("raymix"))}. The data of every table and picture '
        "is in tune.json, beside this page; every loss in mixtures.csv, the law in law.json.</p>",
    ]
    return whole_page(title, parts)


def number(value: float | None) -> str:
    """Return a score as text of three decimals."""
    return _NONE if value is None else f"{value:.3f}"


def interval(told: Document) -> str:
    """Return a predicted value with its interval as text."""
    if told["low"] is None:
        return f"{told['value']:.4f}"
    return f"{told['value']:.4f} [{told['low']:.4f}, {told['high']:.4f}]"


def _facts(document: Document) -> str:
    weights, seeds = document["weights"], document["seeds"]
    kind = "largest weighted loss" if document["minimax"] else "weighted loss"
    told = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    words = [
        f"minimised: {kind} of {told}",
        f"after {document['horizon']:,.0f} steps",
        f"small runs of {document['steps']:,} steps, {document['mode']}",
        f"law {document['law']}",
        f"verified on seeds {', '.join(map(str, seeds))}" if seeds else "not verified",
        f"corpus {document['corpus_fingerprint'][:12]}",
    ]
    return "; ".join(words)


def _verified(document: Document) -> str:
    """Return the table of what was predicted and what was measured."""
    rows = document["verified"]
    means = [row["measured"]["mean"] for row in rows.values()]
    lowest = min((mean for mean in means if mean is not None), default=None)
    heads = ("predicted", "measured", "error", "to uniform", "to proportional")
    lines: list[str] = []
    for role, row in rows.items():
        name = f"{role}, {row['mixture']}" if row["mixture"].startswith("mix-") else role
        outside = "" if row["allowed"] else " (outside the limits)"
        mean = row["measured"]["mean"]
        lines.append(
            f"<tr><td>{escape(name)}{outside}</td>{cell(interval(row['predicted']))}"
            f"{cell(with_spread(row['measured']), best=mean is not None and mean == lowest)}"
            f"{cell(percent(row['error']))}"
            f"{''.join(_difference(row['against'].get(base)) for base in _BASELINES)}</tr>"
        )
    head = f"<tr><th>mixture</th>{''.join(f'<th>{name}</th>' for name in heads)}</tr>"
    note = (
        f"Nats per token after {document['steps']:,} steps. Predicted: with the 95 % interval that "
        "cross-validated errors of the law give. Measured: mean \N{PLUS-MINUS SIGN} sample "
        "standard deviation over seeds that the law has not seen; the lowest in bold. "
        "Differences: each seed against itself, with Student's 95 % interval, coloured where it "
        "leaves out 0."
    )
    return table_card("Predicted and measured", head, lines, note)


def _difference(found: Document | None) -> str:
    text = difference_text(found)
    if found is None or found["low"] is None or found["low"] <= 0 <= found["high"]:
        return cell(text)
    return f'<td class="{"good" if found["mean"] < 0 else "warn"}">{text}</td>'


def _judged(document: Document) -> str:
    """Return the table of the law's scores beside BiMix's claims and models that know less."""
    told = document["judged"]
    claims = told["claims"]
    lines = [
        f"<tr><td>BiMix as published</td><td>&gt; {claims['unseen_r2']}</td>"
        f"{cell('') * 4}<td>&lt; {percent(claims['ahead_mre'])}</td></tr>"
    ]
    for name, row in told["laws"].items():
        every, last, ahead = (row[key] or _NOTHING for key in ("unseen", "unseen_last", "ahead"))
        lines.append(_scores(name, every, last, ahead))
    for name, every in told["nulls"].items():
        last = told["nulls_last"].get(name) or _NOTHING
        lines.append(_scores(f"knows less: {name}", every, last, _NOTHING))
    heads = (
        "unseen: R2",
        "rank correlation",
        "relative error",
        "last step alone: R2",
        "rank correlation",
        "later steps: relative error",
    )
    head = f"<tr><th></th>{''.join(f'<th>{text}</th>' for text in heads)}</tr>"
    note = (
        f"{escape(told['verdict'])} Mean over losses. Unseen: runs left out of the fit, all their "
        "steps; most of that variance is the training curve, which a law blind to the mixture "
        "predicts too, so the last step alone tells more. Later steps: predicted from the earlier "
        f"ones. The claims are those of {escape(claims['paper'])}, on other data and models."
    )
    return table_card("What the law is worth", head, lines, note)


def _scores(name: str, every: Document, last: Document, ahead: Document) -> str:
    cells = [
        *(number(every["r2"]), number(every["spearman"]), percent(every["mre"])),
        *(number(last["r2"]), number(last["spearman"]), percent(ahead["mre"])),
    ]
    return f"<tr><td>{escape(name)}</td>{''.join(map(cell, cells))}</tr>"


def _panels(title: str, note: str, panels: list[tuple[str, str]]) -> str:
    if not panels:
        return ""
    cards = (f'<figure class="card"><h3>{escape(name)}</h3>{svg}</figure>' for name, svg in panels)
    return (
        f'<h2>{escape(title)}</h2><p class="quiet">{escape(note)}</p>'
        f'<div class="panels">{"".join(cards)}</div>'
    )


def _runs(document: Document) -> str:
    """Return the table of the small runs, best first."""
    runs = sorted(
        document["runs"], key=lambda run: (run["value"] is None, run["value"] or 0.0, run["name"])
    )
    lines = [
        f"<tr><td>{escape(run['name'])}</td>{cell(escape(run['origin']))}"
        f"{cell(_state(run))}{cell(_loss(run['value']))}{cell(_loss(run['predicted']))}</tr>"
        for run in runs
    ]
    head = "<tr><th>run</th><th>from</th><th>steps</th><th>measured</th><th>fitted</th></tr>"
    note = "The law was fitted to these; the shares of each are in mixtures.csv."
    return table_card("The small runs", head, lines, note)


def _state(run: Document) -> str:
    said = "" if run["state"] == "done" else f" ({run['state']})"
    return f"{run['step']:,}{said}"


def _loss(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _failures(document: Document) -> str:
    told = "".join(
        f"<p>{escape(name)}: {escape(problem)}</p>"
        for name, problem in document["problems"].items()
    )
    return f'<h2>Runs that failed</h2><div class="card notes">{told}</div>' if told else ""
