"""The page of merged specialists, drawn from its document and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

from raymix.report.figures.style import COLOURS, figure, require_matplotlib, to_svg
from raymix.report.pages.comparison import (
    cell,
    difference_text,
    figure_card,
    table_card,
    with_spread,
)
from raymix.report.pages.run import whole_page

Document = Mapping[str, Any]

_NONE = "\N{EN DASH}"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def specialists_page(document: Document) -> str:
    """Return the page as HTML: models, differences, loss by scale, domains, specialists.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    title = f"{document['name']}: {len(document['domains'])} specialists merged"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_facts(document))}</p>',
        _models(document),
        _bars(document),
        _differences(document),
        _curves(document),
        _domains(document),
        _matrix(document),
        _failures(document),
        f'<p class="quiet">raymix {escape(version("raymix"))}. The data of every table and picture '
        "is in specialists.json, beside this page.</p>",
    ]
    return whole_page(title, parts)


def percent_spread(found: Document) -> str:
    """Return a share with its standard deviation over seeds as percentages."""
    if found["mean"] is None:
        return _NONE
    sd = "" if found["sd"] is None else f" {_PLUS_MINUS} {100 * found['sd']:.1f}"
    return f"{100 * found['mean']:.1f}{sd} %"


def scale_text(found: Document | None) -> str:
    """Return the scale found, its mean and its range over seeds; a dash where there is none."""
    if found is None:
        return _NONE
    low, high = min(found["by_seed"].values()), max(found["by_seed"].values())
    between = "" if low == high else f" ({low:.2g} to {high:.2g})"
    return f"{found['mean']:.2g}{between}"


def _facts(document: Document) -> str:
    base = (
        f"base {document['base']}"
        if document["base"]
        else f"base trained on {document['base_tokens']:,} tokens"
    )
    held = document["held_out"]
    shared = ", ".join(held["shared"])
    note = f"; all that is held out of {shared} is one document, both parts are of it"
    return (
        f"{document['parameters']:,} parameters; seeds {', '.join(map(str, document['seeds']))}; "
        f"{base}; specialists {document['tokens']:,} tokens each; joint "
        f"{document['joint_tokens']:,} tokens of all domains; losses on the first "
        f"{held['test_rows']} held-out rows of each domain, scales chosen on at most "
        f"{held['search_rows']} others; corpus {document['corpus_fingerprint'][:12]}"
        f"{note if shared else ''}"
    )


def _models(document: Document) -> str:
    heads = (
        "model", "loss at scale 1", "recovered", "best scale", "loss there", "recovered", "to joint"
    )  # fmt: skip
    lines: list[str] = []
    for name, row in document["rows"].items():
        cells = [with_spread(row["mean"]), percent_spread(row["recovered"]), "", "", ""]
        cells.append("" if name == "joint" else difference_text(row["to_joint"]))
        lines.append(_line(name, cells))
    lowest = {
        at: min((row[at]["mean"]["mean"] for row in document["merges"].values()), default=None)
        for at in ("given", "best")
    }
    for name, row in document["merges"].items():
        given, best = row["given"], row["best"]
        cells = [
            cell(with_spread(given["mean"]), best=given["mean"]["mean"] == lowest["given"]),
            cell(percent_spread(given["recovered"])),
            cell(scale_text(row["scale"])),
            cell(with_spread(best["mean"]), best=best["mean"]["mean"] == lowest["best"]),
            cell(percent_spread(best["recovered"])),
            cell(difference_text(best["to_joint"])),
        ]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = "<tr>" + "".join(f"<th>{text}</th>" for text in heads) + "</tr>"
    note = (
        f"Held-out loss in nats per token, mean over domains: mean {_PLUS_MINUS} sample standard "
        "deviation over seeds. Specialists: every domain by its own. Recovered: of the way from "
        "the base to the specialists. To joint: each seed to itself, with Student's 95 % interval. "
        "The lowest of the merges in bold, which is not to say that it is better."
    )
    return table_card("What merging comes to", head, lines, note)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"<tr><td>{escape(name)}</td>{''.join(cell(text) for text in cells)}</tr>"


def _bars(document: Document) -> str:
    """Return the picture of all models: a dot per seed, base and joint training as lines."""
    merges, rows = document["merges"], document["rows"]
    if not merges:
        return ""
    with figure(110 + 22.0 * len(merges)) as (sheet, (axes,)):
        for at, row in enumerate(merges.values()):
            for which, colour, lift in (("given", COLOURS[1], -0.15), ("best", COLOURS[0], 0.15)):
                values = list(row[which]["mean"]["by_seed"].values())
                axes.plot(
                    values, [at + lift] * len(values), linestyle="none", marker="o", markersize=4,
                    color=colour, label=_WHICH[which] if at == 0 else None,
                )  # fmt: skip
        for name, dash in zip(("base", "joint", "specialists"), _DASHES, strict=True):
            mean = rows[name]["mean"]["mean"]
            axes.axvline(mean, color=COLOURS[2], linestyle=dash, linewidth=1.2, label=name)
        axes.set_yticks(range(len(merges)), list(merges))
        axes.invert_yaxis()
        axes.set_xlim(right=_right(document))
        axes.set_xlabel("nats per token")
        sheet.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
        svg = to_svg(sheet, "specialists-models")
    caption = "A dot per seed. Far worse than the base is right of the picture."
    return figure_card("Mean loss of every merge", svg, caption)


_WHICH = {"given": "scale 1", "best": "best scale"}


def _right(document: Document) -> float:
    """Return the largest loss shown: the base's, and as much again as joint training gained."""
    base, joint = (document["rows"][name]["mean"]["mean"] for name in ("base", "joint"))
    return float(base + 0.5 * abs(base - joint))


def _differences(document: Document) -> str:
    merges = list(document["merges"])
    if len(merges) < 2:
        return ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in merges)
    lines = [
        "<tr><td>"
        + escape(name)
        + "</td>"
        + "".join(_difference(document["differences"]["best"][name].get(o)) for o in merges)
        + "</tr>"
        for name in merges
    ]
    note = (
        "Row minus column at each one's best scale, nats per token: mean over seeds of the mean "
        "loss, each seed to itself; coloured where Student's 95 % interval leaves out 0. Among so "
        "many some do by chance."
    )
    return table_card("Method against method", f"<tr><th></th>{heads}</tr>", lines, note)


def _difference(found: Document | None) -> str:
    if found is None:
        return cell(_NONE)
    text = f"{found['mean']:+.3f}"
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return cell(text)
    return f'<td class="{"good" if found["mean"] < 0 else "warn"}">{text}</td>'


def _curves(document: Document) -> str:
    """Return the picture of the search of the first seed: loss by scale."""
    seed = str(document["seeds"][0])
    found = {
        name: row["curves"][seed]
        for name, row in document["merges"].items()
        if len(row["curves"].get(seed, ())) > 1
    }
    if not found:
        return ""
    with figure(340 + 18.0 * (len(found) // 3)) as (sheet, (axes,)):
        for at, (name, points) in enumerate(found.items()):
            usable = [point for point in points if point["loss"] is not None]
            axes.plot(
                [point["scale"] for point in usable], [point["loss"] for point in usable],
                color=COLOURS[at % len(COLOURS)], linestyle=_DASHES[at // len(COLOURS) % 3],
                linewidth=1.2, marker="o", markersize=2.5, label=name,
            )  # fmt: skip
        lowest = min(p["loss"] for points in found.values() for p in points if p["loss"])
        axes.set_ylim(lowest - 0.05, lowest + 1.5 * (_right(document) - lowest))
        axes.set_xscale("log")
        axes.set_xlabel("scale")
        axes.set_ylabel("nats per token")
        sheet.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
        svg = to_svg(sheet, "specialists-curves")
    caption = f"Seed {seed}, on the rows to choose by; every point is a merge that was made."
    return figure_card("Loss by scale", svg, caption)


def _domains(document: Document) -> str:
    domains = document["domains"]
    head = "".join(f"<th>{escape(name)}</th>" for name in domains)
    rows = document["rows"] | {name: row["best"] for name, row in document["merges"].items()}
    lines = [
        _line(name, [with_spread(row["domains"][domain]) for domain in domains])
        for name, row in rows.items()
    ]
    note = "Nats per token; merges at their best scale."
    return table_card("By domain", f"<tr><th>model</th>{head}</tr>", lines, note)


def _matrix(document: Document) -> str:
    domains = document["domains"]
    head = "".join(f"<th>{escape(name)}</th>" for name in domains)
    lines = [
        _line(name, [f"{document['matrix'][name][other]:.4f}" for other in domains])
        for name in domains
    ]
    note = "Row: the specialist. Column: the domain it is scored on. Mean over seeds."
    title = "What a specialist unlearns"
    return table_card(title, f"<tr><th>specialist</th>{head}</tr>", lines, note)


def _failures(document: Document) -> str:
    told = "".join(
        f"<p>{escape(name)}: {escape(said)}</p>" for name, said in document["problems"].items()
    )
    return f'<h2>Merges that failed</h2><div class="card notes">{told}</div>' if told else ""
