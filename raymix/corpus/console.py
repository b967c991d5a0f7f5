"""Console output of `raymix prepare`: a progress bar or lines, and the table of domains."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from raymix._utils.formatting import clock, short
from raymix.corpus.progress import Listener, PrepareProgress, Stage
from raymix.store import DomainInfo, Manifest

_TITLES: dict[Stage, str] = {
    "plan": "reading the sources' outlines",
    "tokenizer": "training the tokenizer",
    "tokenize": "tokenizing",
    "select": "dropping duplicates, holding out",
    "assemble": "writing shards",
    "done": "done",
}
_LINE_EVERY_S = 5.0


@contextlib.contextmanager
def watching() -> Iterator[Listener]:
    """Yield a listener that shows progress on stdout: live on a terminal, else line by line."""
    if sys.stdout.isatty():
        # stdout: with --json, stdout is redirected before, so that only the document is left there.
        with _live(Console(file=sys.stdout)) as listener:
            yield listener
    else:
        yield _Lines()


@contextlib.contextmanager
def _live(console: Console) -> Iterator[Listener]:
    columns = (
        TextColumn("{task.description:33}"),
        BarColumn(24),
        TextColumn("{task.fields[said]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", said="", total=None)

        def listen(now: PrepareProgress) -> None:
            if now.note:
                bars.console.print(now.note, highlight=False, markup=False)
            bars.update(
                task,
                description=_TITLES[now.stage],
                said=_figures(now),
                completed=now.bytes_done,
                total=now.bytes_total or None,
            )

        yield listen


class _Lines:
    """Prints notes, each stage, and in a long stage a line now and then."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._last = 0.0

    def __call__(self, now: PrepareProgress) -> None:
        """Print what is new."""
        if now.note:
            print(now.note, flush=True)
        # A log file gets a line every few seconds, not one per part: there are up to thousands.
        due = time.monotonic() - self._last > _LINE_EVERY_S
        finished = now.total > 0 and now.done == now.total
        if now.stage != self._stage:
            self._stage, self._last = now.stage, time.monotonic()
        elif now.done and not now.note and (due or finished):
            print(f"{_TITLES[now.stage]}: {_figures(now)}", flush=True)
            self._last = time.monotonic()


def _figures(now: PrepareProgress) -> str:
    parts = []
    if now.bytes_total and now.total:
        parts.append(f"{100 * now.bytes_done / now.bytes_total:3.0f}%")
    if now.tokens:
        parts.append(f"{short(now.tokens)} tokens ({short(now.tokens_per_s)}/s)")
        parts.append(f"{now.documents:,} documents")
    if now.done < now.total and now.eta_s is not None:
        parts.append(f"{clock(now.eta_s)} to go")
    elif now.done and now.done == now.total:
        parts.append(f"took {clock(now.elapsed_s)}")
    return ", ".join(parts)


def print_manifest(path: str, manifest: Manifest) -> None:
    """Print what a corpus holds: a table of its domains and a line on the whole."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("domain")
    for name in ("documents", "tokens", "held out", "text MB", "tokens/doc", "H1", "H2"):
        table.add_column(name, justify="right")
    table.add_column("dropped")
    for name, info in manifest.domains.items():
        table.add_row(name, *_cells(info), _dropped(info))
    console = Console(file=sys.stdout)
    # rich takes 80 columns for a pipe, too few for the table: it would wrap the numbers.
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table)
    tokens = sum(info.train.tokens for info in manifest.domains.values())
    print(
        "tokens/doc: median, 99th percentile; H1, H2: nats per token, of one and given one before"
    )
    print(
        f"{path}: {tokens:,} tokens to train on in {len(manifest.domains)} domains, blocks of "
        f"{manifest.block_tokens:,}; tokenizer {manifest.tokenizer.kind} "
        f"({manifest.tokenizer.vocab_size:,} tokens); fingerprint {manifest.fingerprint[:12]}"
    )


def _cells(info: DomainInfo) -> list[str]:
    train, valid = info.train, info.valid
    size = (train.bytes + valid.bytes) / 1e6
    return [
        f"{train.documents:,}",
        f"{train.tokens:,}",
        f"{valid.tokens:,}",
        f"{size:,.1f}" if size else "",
        f"{train.length_quantiles['p50']:,}",
        f"{train.length_quantiles['p99']:,}",
        "" if train.unigram_entropy is None else f"{train.unigram_entropy:.2f}",
        "" if train.bigram_entropy is None else f"{train.bigram_entropy:.2f}",
    ]


def _dropped(info: DomainInfo) -> str:
    counts = {
        "duplicates": info.duplicates,
        "too short": info.too_short,
        "too long": info.too_long,
        "bad": info.rejected,
    }
    repaired = [f"{info.repaired:,} not dropped but repaired"] if info.repaired else []
    return ", ".join([f"{count:,} {name}" for name, count in counts.items() if count] + repaired)
