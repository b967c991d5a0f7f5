"""The page of a comparison of mixers, drawn from its document and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from raymix.report.figures.progress import floats
from raymix.report.figures.style import (
    COLOURS,
    css_colour,
    figure,
    panel,
    require_matplotlib,
    to_svg,
)
from raymix.report.pages.run import whole_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 24
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
_NONE = "\N{EN DASH}"
_MEASURES = {"mean": "mean over domains", "worst": "worst domain", "target": "targets"}

Document = Mapping[str, Any]


def comparison_page(document: Document) -> str:
    """Return the page as HTML: tables, curves against tokens and operations, a panel per domain.

    Raises:
        RecipeError: If matplotlib is not installed.
    """
    require_matplotlib()
    title = f"{document['name']}: {len(document['mixers'])} mixers compared"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_facts(document))}</p>',
        _legend(document),
        _summary(document),
        _differences(document),
        *(figure_card(*drawn) for drawn in _curves(document)),
        _per_domain(document),
        _panels(document),
        _failures(document),
        f'<p class="quiet">raymix {escape(version("raymix"))}. The data of every table and picture '
        "is in compare.json, beside this page; one line per run in compare.csv.</p>",
    ]
    return whole_page(title, parts)


def _facts(document: Document) -> str:
    seeds = document["seeds"]
    words = [
        f"{document['parameters']:,} parameters",
        f"{document['tokens']:,} tokens in {document['steps']:,} steps",
        f"seeds {', '.join(map(str, seeds))}",
        f"corpus {document['corpus_fingerprint'][:12]}",
    ]
    held = document["targets"]
    return "; ".join([*words, *([f"never trained on: {', '.join(held)}"] if held else [])])


def _legend(document: Document) -> str:
    keys = "".join(
        f"<span>{_key(at)}{escape(name)}</span>" for at, name in enumerate(document["mixers"])
    )
    return f'<p class="legend">{keys}</p>'


def _key(at: int) -> str:
    colour = css_colour(COLOURS[at % len(COLOURS)])
    kind = ("solid", "dashed", "dotted")[at // len(COLOURS) % 3]
    return (
        f'<span class="key" style="background:none;height:0;border-top:4px {kind} {colour}"></span>'
    )


def _measures(document: Document) -> list[str]:
    return [m for m in _MEASURES if any(m in row for row in document["mixers"].values())]


def _summary(document: Document) -> str:
    """Return the table of mixers: final losses with their spread, and the extra compute."""
    measures, mixers = _measures(document), document["mixers"]
    best = {m: _lowest(row[m]["mean"] for row in mixers.values()) for m in measures}
    heads = [*(f"<th>{_MEASURES[m]}<small>nats per token</small></th>" for m in measures)]
    heads += ["<th>extra compute<small>% of training operations</small></th>"]
    lines: list[str] = []
    for at, (name, row) in enumerate(mixers.items()):
        cells = [cell(with_spread(row[m]), best=row[m]["mean"] == best[m]) for m in measures]
        cells.append(cell(percent(row["extra"]["flops_share"]["mean"])))
        runs = f"{row['runs']} of {row['planned']}"
        lines.append(f"<tr><td>{_key(at)}{escape(name)}</td>{cell(runs)}{''.join(cells)}</tr>")
    head = f"<tr><th>mixer</th><th>runs</th>{''.join(heads)}</tr>"
    note = (
        "Held-out loss after the last step: mean \N{PLUS-MINUS SIGN} sample standard deviation "
        "over seeds; the lowest in bold, which is not to say that it is better."
    )
    return table_card("Held-out loss and what it cost", head, lines, note)


def _differences(document: Document) -> str:
    """Return the table of paired differences to the baseline, coloured where 0 is outside."""
    measures, mixers, base = _measures(document), document["mixers"], document["baseline"]
    names = [f"<th>{_MEASURES[m]}</th>" for m in measures]
    lines = [
        f"<tr><td>{_key(at)}{escape(name)}</td>"
        f"{''.join(_difference(row[m]['difference']) for m in measures)}</tr>"
        for at, (name, row) in enumerate(mixers.items())
        if name != base
    ]
    note = (
        f"Mean of (mixer minus {escape(base)}) over seeds, each seed against itself, with "
        "Student's 95 % interval of that one comparison; coloured where it leaves out 0. With many "
        "comparisons some do so by chance."
    )
    title = f"Against {escape(base)}, nats per token"
    return (
        table_card(title, f"<tr><th>mixer</th>{''.join(names)}</tr>", lines, note) if lines else ""
    )


def _difference(found: Document | None) -> str:
    text = difference_text(found)
    if found is None or found["low"] is None or found["low"] <= 0 <= found["high"]:
        return cell(text)
    return f'<td class="{"good" if found["mean"] < 0 else "warn"}">{text}</td>'


def difference_text(found: Document | None) -> str:
    """Return a paired difference as text: the mean, and its interval in brackets."""
    if found is None:
        return _NONE
    if found["low"] is None:
        return f"{found['mean']:+.4f}"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def with_spread(found: Document) -> str:
    """Return a measure as text: mean and standard deviation over seeds."""
    if found["mean"] is None:
        return _NONE
    sd = found["sd"]
    return f"{found['mean']:.4f}" + ("" if sd is None else f" \N{PLUS-MINUS SIGN} {sd:.4f}")


def percent(share: float | None) -> str:
    """Return a share as a percentage of three digits."""
    return _NONE if share is None else f"{100 * share:.3g} %"


def _per_domain(document: Document) -> str:
    mixers = document["mixers"]
    heads = "".join(f"<th>{_key(at)}{escape(name)}</th>" for at, name in enumerate(mixers))
    lines: list[str] = []
    for domain in [*document["domains"], *document["targets"]]:
        found = [row["domains"][domain] for row in mixers.values()]
        best = _lowest(item["mean"] for item in found)
        cells = "".join(cell(with_spread(i), best=i["mean"] == best) for i in found)
        held = " (target)" if domain in document["targets"] else ""
        lines.append(f"<tr><td>{escape(domain)}{held}</td>{cells}</tr>")
    note = "Nats per token, mean \N{PLUS-MINUS SIGN} sample standard deviation over seeds."
    return table_card("Held-out loss per domain", f"<tr><th>domain</th>{heads}</tr>", lines, note)


def table_card(title: str, head: str, lines: Sequence[str], note: str) -> str:
    """Return a titled table in a card, with a note below it."""
    return (
        f'<h2>{title}</h2><div class="card"><div class="scroll"><table><thead>{head}</thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="quiet">{note}</p></div>'
    )


def cell(text: str, *, best: bool = False) -> str:
    """Return a cell of a table; the best one stands out."""
    return f'<td class="best">{text}</td>' if best and text != _NONE else f"<td>{text}</td>"


def _lowest(values: Any) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _curves(document: Document) -> list[tuple[str, str, str]]:
    """Return title, picture and caption of the losses over the run, by tokens and by operations."""
    unit = _unit(document)[1]
    drawn: list[tuple[str, str, str]] = []
    for measure in _measures(document):
        for axis, label in (
            ("tokens", "tokens, millions"),
            ("flops", f"operations of training and measuring, {unit}"),
        ):
            with figure(260) as (sheet, (axes,)):
                _lines(axes, document, (measure,), axis)
                axes.set_ylabel("nats per token")
                axes.set_xlabel(label)
                svg = to_svg(sheet, f"compare-{measure}-{axis}")
            against = "tokens" if axis == "tokens" else "operations"
            title = f"Held-out loss, {_MEASURES[measure]}, against {against}"
            drawn.append((title, svg, "Line: mean over seeds. Band: least and most."))
    return drawn


def _unit(document: Document) -> tuple[float, str]:
    """Return a unit for the operations of a run, and its name."""
    last = [max(row["curve"]["flops"], default=0.0) for row in document["mixers"].values()]
    for scale, name in ((1e18, "exaflop"), (1e15, "petaflop"), (1e12, "teraflop")):
        if max(last, default=0.0) >= scale:
            return scale, name
    return 1e9, "gigaflop"


def _lines(axes: Axes, document: Document, path: Sequence[str], axis: str) -> None:
    """Draw every mixer's curve; the steep beginning is left above the picture."""
    scale, _ = _unit(document)
    low: list[float] = []
    high: list[float] = []
    for at, row in enumerate(document["mixers"].values()):
        curve: Any = row["curve"]
        band = curve
        for key in path:
            band = band.get(key) or {}
        mean = floats(band.get("mean", []))
        if not mean.size:
            continue
        x = floats(curve[axis]) / (1e6 if axis == "tokens" else scale)
        colour = COLOURS[at % len(COLOURS)]
        dash = _DASHES[at // len(COLOURS) % len(_DASHES)]
        axes.fill_between(
            x, floats(band["low"]), floats(band["high"]), color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(x, mean, color=colour, linestyle=dash, linewidth=1.3)
        low.append(float(floats(band["low"]).min()))
        # What follows the first fifth of the evaluations is what one wants to tell apart.
        high.append(float(mean[min(len(mean) - 1, max(1, len(mean) // 5))]))
    if low and max(high) > min(low):
        room = 0.06 * (max(high) - min(low))
        axes.set_ylim(min(low) - room, max(high) + room)


def _panels(document: Document) -> str:
    names = [*document["targets"], *document["domains"]]
    cards: list[str] = []
    for name in names[:MOST_PANELS]:
        with panel() as (sheet, axes):
            _lines(axes, document, ("domains", name), "flops")
            axes.set_xlabel(_unit(document)[1], fontsize=9)
            axes.set_ylabel("nats per token", fontsize=9)
            axes.locator_params(nbins=4)
            svg = to_svg(sheet, f"compare-domain-{name}")
        held = "<span>target</span>" if name in document["targets"] else ""
        cards.append(f'<figure class="card"><h3>{escape(name)}{held}</h3>{svg}</figure>')
    left = len(names) - MOST_PANELS
    rest = f" {left:,} further domains are in the table only." if left > 0 else ""
    return (
        '<h2>Every domain against operations</h2><p class="quiet">Training and measuring '
        f'together; mean over seeds, band from least to most.{rest}</p><div class="panels">'
        f"{''.join(cards)}</div>"
    )


def figure_card(title: str, svg: str, caption: str) -> str:
    """Return a titled picture in a card, with its caption."""
    return (
        f'<h2>{escape(title)}</h2><figure class="card">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _failures(document: Document) -> str:
    failed = [run for run in document["runs"] if run["state"] != "done"]
    told = "".join(
        f"<p>{escape(run['mixer'])}, seed {run['seed']}: {escape(run['problem'] or '')}</p>"
        for run in failed
    )
    return f'<h2>Runs that failed</h2><div class="card notes">{told}</div>' if told else ""
