"""The page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymix.report.data.steps import Document
from raymix.report.data.summary import MAX_ROWS
from raymix.report.figures import mixture, progress, schedule, signals
from raymix.report.figures.chart import Chart
from raymix.report.formatting import ABSENT, amount, fixed
from raymix.report.pages.render import render
from raymix.report.pages.tables import DataTable, TableCell, TableHead, TableRow, best_cell

_DomainRow = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class _DomainColumn:
    """A column of the table of domains."""

    label: str
    unit: str
    key: str
    """Of the value in a domain's row."""
    form: str = "{:.3f}"
    scale: float = 1.0


def run_page(runs: Sequence[Document], *, twin: str) -> str:
    """Return the page as HTML.

    Args:
        runs: The summary of each run, with its training curves under `curves`.
        twin: Name of the JSON file with the summaries.
    """
    several = len(runs) > 1
    axis = progress.progress_axis(runs)
    left_out = max(run["heldout"]["left_out"] for run in runs)
    note = (
        "Nats per token on text that is never trained on. Dotted: the unigram entropy, the loss of "
        "knowing only how often each token occurs."
    )
    if any(run["law"] for run in runs):
        note += " Dashed: the prediction of the search's law for the run's shares."
    if left_out:
        note += f" The {left_out:,} smaller domains are in the table's data only."
    return render(
        "run",
        title=", ".join(run["name"] for run in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        facts="",
        page_legend=progress.run_series(runs) if several else [],
        headers=[
            {"name": run["name"], "entries": _header(run), "notes": run["notes"]} for run in runs
        ],
        tables=[
            *([_comparison(runs)] if several else []),
            *(_domain_table(run, several=several) for run in runs),
        ],
        figures=_charts(runs, axis),
        heldout=progress.heldout_panels(runs, axis),
        heldout_note=note,
        twin=twin,
    )


def _charts(runs: Sequence[Document], axis: progress.ProgressAxis) -> list[Chart]:
    """Return the large charts: those of all runs together, then each kind run by run."""
    charts = [
        progress.training_loss(runs, axis),
        progress.throughput(runs, axis),
        progress.gradient_norm(runs, axis),
    ]
    # Kind by kind, not run by run: what is to be compared stands together.
    per_run: tuple[Callable[[Document], Sequence[Chart | None]], ...] = (
        lambda run: [progress.domain_training_loss(run, axis)],
        lambda run: [mixture.mixture_over_time(run)],
        lambda run: [signals.gradient_signals(run)],
        lambda run: [mixture.read_against_asked(run)],
        lambda run: [mixture.domain_tokens(run)],
        schedule.planned_charts,
    )
    for draw in per_run:
        for run in runs:
            drawn = draw(run)
            if len(runs) > 1:
                drawn = [c and replace(c, title=f"{c.title}: {run['name']}") for c in drawn]
            charts += drawn
    return [chart for chart in charts if chart is not None]


def _header(run: Document) -> list[tuple[str, Any]]:
    head = run["header"]
    entries = [
        ("state", run["state"]),
        ("training loss", _training_loss(run)),
        ("model", _model(head)),
        ("trained on", _trained_on(head)),
        ("corpus", _corpus(head)),
        ("mixer", head.get("mixer")),
        ("law", _law(run["law"])),
        ("machine", _join(head.get("machine"), _workers(head.get("workers")))),
        ("versions", ", ".join(f"{k} {v}" for k, v in head.get("versions", {}).items())),
        ("started", head.get("started")),
        ("revision", head.get("revision")),
        ("seed", head.get("seed")),
        # The page is often sent on: the path says where the run is.
        ("directory", run["path"]),
    ]
    return [(label, value) for label, value in entries if value not in (None, "")]


def _training_loss(run: Document) -> str:
    """Return the losses that `watch` shows, in its words."""
    training, curves = run["training"], run["curves"]
    if not training["step"]:
        return ""
    # Four decimals, as `train` and `watch` print them: the same number looks the same.
    last, mean = training["loss"][-1], curves["loss_mean"]
    return _join(
        None if last is None else f"{last:.4f} nats per token at step {training['step'][-1]:,}",
        None
        if mean is None
        else f"mean of the last {curves['loss_mean_steps']:,} steps {mean:.4f}",
    )


def _model(head: Document) -> str:
    size = head.get("parameters")
    return _join(head.get("model"), f"{amount(size)} parameters" if size else None)


def _law(law: Document | None) -> str | None:
    if law is None:
        return None
    error, unseen = law["error"], law["unseen"].get("r2")
    return _join(
        f"{law['kind']}, of the search that this run belongs to",
        None if unseen is None else f"R2 {unseen:.3f} on unseen runs",
        None if error is None else f"off by {error:.2%} at the end of this run",
    )


def _trained_on(head: Document) -> str:
    tokens, speed = head.get("tokens"), head.get("tokens_per_s")
    return _join(
        f"{amount(tokens)} tokens" if tokens is not None else None,
        f"median {amount(speed)} tokens/s" if speed is not None else None,
    )


def _corpus(head: Document) -> str:
    tokens, vocabulary = head.get("corpus_tokens"), head.get("vocabulary")
    fingerprint = head.get("corpus_fingerprint")
    return _join(
        head.get("corpus"),
        f"{amount(tokens)} training tokens" if tokens else None,
        f"vocabulary {vocabulary:,}" if vocabulary else None,
        f"fingerprint {fingerprint[:12]}" if fingerprint else None,
    )


def _workers(workers: int | None) -> str | None:
    if workers is None:
        return None
    return f"{workers} worker{'s' * (workers != 1)}" if workers else "in one process, without Ray"


def _join(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _domain_table(run: Document, *, several: bool) -> DataTable:
    """Return the table of a run's domains; those beyond the limit are summed up in one row."""
    columns = _domain_columns(run)
    shown = list(run["domains"].items())
    recent = run["curves"]["domain_loss_mean"]
    rows = [
        _domain_row(name, {**row, "train_loss": recent.get(name)}, columns)
        for name, row in shown[:MAX_ROWS]
    ]
    if rest := [row for _, row in shown[MAX_ROWS:]]:
        rows.append(_domain_row(f"{len(rest):,} others", _summed(rest), columns))
    judgements = [_judgement(row) for _, row in shown]
    below, judged = judgements.count("good"), sum(map(bool, judgements))
    says = f"Held-out loss ends below the unigram entropy in {below} of {judged} domains read."
    return DataTable(
        title=f"Domains: {run['name']}" if several else "Domains",
        heads=[TableHead("domain"), *(TableHead(column.label, column.unit) for column in columns)],
        rows=rows,
        note=says if judged else "",
    )


def _domain_columns(run: Document) -> list[_DomainColumn]:
    """Return the columns, whose units say which loss each is."""
    steps, window = run["heldout"]["step"], run["curves"]["loss_mean_steps"]
    before = f", after step {steps[0]:,}" if steps and steps[0] else ""
    after = f", after step {steps[-1]:,}" if steps else ""
    columns = [
        _DomainColumn("tokens read", "", "tokens", "{:,.0f}"),
        _DomainColumn("share asked", "%, mean", "share_asked", "{:.2f}", 100),
        _DomainColumn("share read", "%", "share_realised", "{:.2f}", 100),
        _DomainColumn("epochs", "", "epochs", "{:.2f}"),
        _DomainColumn("training loss", f"nats/token, last {window:,} steps", "train_loss"),
        _DomainColumn("held-out loss before", f"nats/token{before}", "loss_first"),
        _DomainColumn("held-out loss", f"nats/token{after}", "loss_last"),
        _DomainColumn("unigram entropy", "nats/token", "unigram_entropy"),
        _DomainColumn("bits per byte", "held out", "bits_per_byte"),
    ]
    if run["curves"]["domain_loss"] is None:
        # Runs of earlier versions did not record it: a column of dashes would only take room.
        return [column for column in columns if column.key != "train_loss"]
    return columns


def _domain_row(name: str, row: _DomainRow, columns: Sequence[_DomainColumn]) -> TableRow:
    cells: list[TableCell] = []
    for column in columns:
        value = row.get(column.key)
        text = ABSENT if value is None else column.form.format(column.scale * value)
        cells.append(TableCell(text, _judgement(row) if column.key == "loss_last" else ""))
    return TableRow(TableHead(name), cells)


def _judgement(row: _DomainRow) -> str:
    """Return `good` where the final loss is below the unigram entropy, `warn` above it.

    A domain that was not read is not judged.
    """
    loss, entropy = row.get("loss_last"), row.get("unigram_entropy")
    if loss is None or entropy is None or not row.get("tokens"):
        return ""
    return "good" if loss < entropy else "warn"


def _summed(rows: Sequence[_DomainRow]) -> _DomainRow:
    """Return the sums of what can be summed over domains; losses cannot."""
    keys = ("tokens", "share_asked", "share_realised")
    return {
        key: None if any(row[key] is None for row in rows) else sum(row[key] or 0 for row in rows)
        for key in keys
    }


def _comparison(runs: Sequence[Document]) -> DataTable:
    """Return the table of final held-out losses: a row per domain, a column per run.

    Losses per token of unlike tokenizers do not compare: then the table is in bits per byte.
    """
    same_tokenizer = len({run["header"].get("tokenizer") for run in runs}) == 1
    key = "loss_last" if same_tokenizer else "bits_per_byte"
    unit = "nats per token" if same_tokenizer else "bits per byte"
    # Runs of several corpora are compared on the union of their domains.
    names = list(dict.fromkeys(name for run in runs for name in run["domains"]))[:MAX_ROWS]
    heads = [TableHead("domain", unit)]
    heads += [TableHead(series.label, series=series) for series in progress.run_series(runs)]
    rows = [
        _best_in_bold(name, [(run["domains"].get(name) or {}).get(key) for run in runs])
        for name in names
    ]
    rows.append(_best_in_bold("mean", [_mean(run, names, key) for run in runs]))
    return DataTable(title="Held-out loss side by side", heads=heads, rows=rows)


def _mean(run: Document, names: Sequence[str], key: str) -> float | None:
    losses = [(run["domains"].get(name) or {}).get(key) for name in names]
    known = [loss for loss in losses if loss is not None]
    # A mean over fewer domains than the others' would compare unlike things.
    return sum(known) / len(known) if len(known) == len(names) else None


def _best_in_bold(name: str, values: Sequence[float | None]) -> TableRow:
    best = min((value for value in values if value is not None), default=None)
    cells = [best_cell(fixed(value, 3), best=value is not None and value == best)
             for value in values]  # fmt: skip
    return TableRow(TableHead(name), cells)
