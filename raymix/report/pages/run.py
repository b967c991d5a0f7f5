"""The page of a report: one HTML file that holds everything and asks nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.metadata import version

from raymix.report.data.steps import Document
from raymix.report.data.summary import MOST_ROWS
from raymix.report.figures.progress import Picture
from raymix.report.figures.style import COLOURS, css_colour, css_variables

_CSS = """
:root{color-scheme:light dark;--ink:#1b1b1f;--muted:#6b6b76;--grid:#e4e4ea;--paper:#fff;
--back:#f4f4f7;--good:#00704f;--warn:#a04000;LIGHT}
@media (prefers-color-scheme:dark){:root{--ink:#ececf1;--muted:#9a9aa8;--grid:#34343d;
--paper:#1d1d22;--back:#131316;--good:#4ccf9f;--warn:#f0a060;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.4em 0 .1em}h2{font-size:1.2rem;margin:1.6em 0 .5em}
h3{font-size:1rem;margin:0 0 .3em}p{margin:.3em 0}
.quiet{color:var(--muted);font-size:.9rem}
.card{background:var(--paper);border:1px solid var(--grid);border-radius:8px;padding:12px}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.panels{display:grid;gap:8px;grid-template-columns:repeat(auto-fill,minmax(min(46%,200px),1fr))}
.panels .card{padding:8px}.panels h3{display:flex;justify-content:space-between;gap:6px;
font-size:.9rem;overflow-wrap:break-word}.panels h3 span{color:var(--muted);font-weight:400;
text-align:right}.panels h3>*{min-width:min-content}
figure{margin:0}figcaption{color:var(--muted);font-size:.9rem}
svg{display:block;width:100%;height:auto;max-width:620px;margin:0 auto}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{font-weight:600;vertical-align:bottom;white-space:normal}
th small{font-weight:400;color:var(--muted);display:block}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
td.good{color:var(--good)}td.warn{color:var(--warn)}td.best{font-weight:700}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:0;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.key{display:inline-block;width:22px;height:4px;border-radius:2px;margin-right:6px;
vertical-align:middle}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem}
.notes{border-left:4px solid var(--warn)}
"""

_Cell = tuple[str, str]
_Row = dict[str, float | None]


def render(
    runs: Sequence[Document],
    pictures: Sequence[Picture],
    panels: Sequence[Picture],
    *,
    twin: str,
) -> str:
    """Return the page as HTML.

    Args:
        runs: The data of each run.
        pictures: The figures of normal size, in order.
        panels: The held-out loss of each domain.
        twin: Name of the JSON file with the data behind everything.
    """
    title = ", ".join(run["name"] for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _legend(runs),
        f'<div class="grid">{"".join(_head(run, several=len(runs) > 1) for run in runs)}</div>',
        _comparison(runs) if len(runs) > 1 else "",
        *(_table(run, several=len(runs) > 1) for run in runs),
        '<h2>The run in pictures</h2><div class="grid">',
        *(_picture(picture) for picture in pictures),
        "</div>",
        _panels(panels, runs),
        f'<p class="quiet">raymix {escape(version("raymix"))}. The data of every table and picture '
        f"is in {escape(twin)}, beside this page.</p>",
    ]
    return whole_page(title, parts)


def whole_page(title: str, parts: Sequence[str]) -> str:
    """Return the HTML document of a page whose body is `parts`, in the house's looks."""
    style = _CSS.replace("LIGHT", css_variables(0)).replace("DARK", css_variables(1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - raymix</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _legend(runs: Sequence[Document]) -> str:
    if len(runs) == 1:
        return ""
    keys = "".join(f"<span>{_key(at)}{escape(run['name'])}</span>" for at, run in enumerate(runs))
    return f'<p class="legend">{keys}</p>'


def _key(at: int) -> str:
    colour = css_colour(COLOURS[at % len(COLOURS)])
    return f'<span class="key" style="background:{colour}"></span>'


def _head(run: Document, *, several: bool) -> str:
    head = run["header"]
    entries = [
        ("state", run["state"]),
        ("model", _model(head)),
        ("trained on", _trained(head)),
        ("corpus", _corpus(head)),
        ("mixer", head.get("mixer")),
        ("law", _law(run["law"])),
        ("machine", _join(head.get("machine"), _workers(head.get("workers")))),
        ("versions", ", ".join(f"{k} {v}" for k, v in head.get("versions", {}).items())),
        ("started", head.get("started")),
        ("revision", head.get("revision")),
        ("seed", head.get("seed")),
        ("directory", run["path"]),
    ]
    told = "".join(
        f"<dt>{label}</dt><dd>{escape(str(value))}</dd>"
        for label, value in entries
        if value not in (None, "")
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in run["notes"])
    notes = f'<div class="card notes">{notes}</div>' if notes else ""
    title = f"<h3>{escape(run['name'])}</h3>" if several else ""
    return f'<div class="card">{title}<dl>{told}</dl>{notes}</div>'


def _model(head: Document) -> str:
    size = head.get("parameters")
    return _join(head.get("model"), f"{_amount(size)} parameters" if size else None)


def _law(law: Document | None) -> str | None:
    if law is None:
        return None
    error, unseen = law["error"], law["unseen"].get("r2")
    return _join(
        f"{law['kind']}, of the search that this run belongs to",
        None if unseen is None else f"R2 {unseen:.3f} on runs it has not seen",
        None if error is None else f"off by {error:.2%} at the end of this run",
    )


def _trained(head: Document) -> str:
    tokens, speed = head.get("tokens"), head.get("tokens_per_s")
    return _join(
        f"{_amount(tokens)} tokens" if tokens is not None else None,
        f"median {_amount(speed)} tokens/s" if speed is not None else None,
    )


def _corpus(head: Document) -> str:
    tokens, vocabulary = head.get("corpus_tokens"), head.get("vocabulary")
    fingerprint = head.get("corpus_fingerprint")
    return _join(
        head.get("corpus"),
        f"{_amount(tokens)} training tokens" if tokens else None,
        f"vocabulary {vocabulary:,}" if vocabulary else None,
        f"fingerprint {fingerprint[:12]}" if fingerprint else None,
    )


def _workers(workers: int | None) -> str | None:
    if workers is None:
        return None
    return f"{workers} worker{'s' * (workers != 1)}" if workers else "in one process, without Ray"


def _join(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _amount(value: float) -> str:
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


_COLUMNS: tuple[tuple[str, str, Callable[[_Row], _Cell]], ...] = (
    ("tokens read", "", lambda row: _number(row, "tokens", "{:,.0f}")),
    ("share asked", "%", lambda row: _number(row, "share_asked", "{:.2f}", 100)),
    ("share read", "%", lambda row: _number(row, "share_realised", "{:.2f}", 100)),
    ("epochs", "", lambda row: _number(row, "epochs", "{:.2f}")),
    ("loss before", "nats/token", lambda row: _number(row, "loss_first", "{:.3f}")),
    ("loss after", "nats/token", lambda row: (_number(row, "loss_last", "{:.3f}")[0], _mark(row))),
    ("unigram entropy", "nats/token", lambda row: _number(row, "unigram_entropy", "{:.3f}")),
    ("bits per byte", "", lambda row: _number(row, "bits_per_byte", "{:.3f}")),
)


def _number(row: _Row, key: str, form: str, scale: float = 1) -> _Cell:
    value = row.get(key)
    return ("\N{EN DASH}" if value is None else form.format(scale * value), "")


def _mark(row: _Row) -> str:
    """Return the class of a final loss: `good` below the unigram entropy, `warn` above it.

    A domain that was not read is not judged.
    """
    loss, entropy = row.get("loss_last"), row.get("unigram_entropy")
    if loss is None or entropy is None or not row.get("tokens"):
        return ""
    return "good" if loss < entropy else "warn"


def _table(run: Document, *, several: bool) -> str:
    heads = "".join(f"<th>{label}<small>{unit}</small></th>" for label, unit, _ in _COLUMNS)
    shown = list(run["domains"].items())
    lines = [_line(name, row) for name, row in shown[:MOST_ROWS]]
    if rest := [row for _, row in shown[MOST_ROWS:]]:
        lines.append(_line(f"{len(rest):,} others", _together(rest)))
    below = sum(_mark(row) == "good" for _, row in shown)
    judged = sum(bool(_mark(row)) for _, row in shown)
    says = f"Held-out loss ends below the unigram entropy in {below} of {judged} domains read."
    title = f"Domains: {escape(run['name'])}" if several else "Domains"
    return (
        f'<h2>{title}</h2><div class="card"><div class="scroll"><table><thead><tr><th>domain</th>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="quiet">{says if judged else ""}</p></div>'
    )


def _line(name: str, row: _Row) -> str:
    cells = "".join(_cell(make(row)) for _, _, make in _COLUMNS)
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _cell(cell: _Cell) -> str:
    text, kind = cell
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def _together(rows: Sequence[_Row]) -> _Row:
    keys = ("tokens", "share_asked", "share_realised")
    return {
        key: None if any(row[key] is None for row in rows) else sum(row[key] or 0 for row in rows)
        for key in keys
    }


def _comparison(runs: Sequence[Document]) -> str:
    """Return the table of final held-out losses: domains down, runs across, the best in bold.

    A token is not the same thing to different tokenizers: then bits per byte are compared.
    """
    same = len({run["header"].get("tokenizer") for run in runs}) == 1
    key, unit = ("loss_last", "nats per token") if same else ("bits_per_byte", "bits per byte")
    names = list(dict.fromkeys(name for run in runs for name in run["domains"]))[:MOST_ROWS]
    heads = "".join(f"<th>{_key(at)}{escape(run['name'])}</th>" for at, run in enumerate(runs))
    lines: list[str] = []
    for name in names:
        losses = [(run["domains"].get(name) or {}).get(key) for run in runs]
        lines.append(f"<tr><td>{escape(name)}</td>{_best_in_bold(losses)}</tr>")
    means = [_mean(run, names, key) for run in runs]
    lines.append(f"<tr><td>mean</td>{_best_in_bold(means)}</tr>")
    return (
        '<h2>Held-out loss side by side</h2><div class="card"><div class="scroll"><table><thead>'
        f"<tr><th>domain<small>{unit}</small></th>{heads}</tr></thead><tbody>"
        f"{''.join(lines)}</tbody></table></div></div>"
    )


def _mean(run: Document, names: Sequence[str], key: str) -> float | None:
    losses = [(run["domains"].get(name) or {}).get(key) for name in names]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if len(known) == len(names) else None


def _best_in_bold(values: Sequence[float | None]) -> str:
    best = min((value for value in values if value is not None), default=None)
    return "".join(
        _cell(
            ("\N{EN DASH}", "")
            if value is None
            else (f"{value:.3f}", "best" if value == best else "")
        )
        for value in values
    )


def _picture(picture: Picture) -> str:
    return (
        f'<figure class="card"><h3>{escape(picture.title)}</h3>{picture.svg}'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _panels(panels: Sequence[Picture], runs: Sequence[Document]) -> str:
    if not panels:
        return ""
    cards = "".join(
        f'<figure class="card"><h3>{escape(panel.title)}<span>{escape(panel.caption)}</span></h3>'
        f"{panel.svg}</figure>"
        for panel in panels
    )
    left_out = max(run["heldout"]["left_out"] for run in runs)
    rest = f" The {left_out:,} smaller domains are in the table's data only." if left_out else ""
    foretold = any(run["law"] for run in runs)
    law = " Dashed: what the law of the search foretells for the run's shares." * foretold
    return (
        '<h2>Held-out loss per domain</h2><p class="quiet">Dotted: the unigram entropy, what '
        f"knowing only how often each token occurs would reach.{law}{rest}</p>"
        f'<div class="panels">{cards}</div>'
    )
