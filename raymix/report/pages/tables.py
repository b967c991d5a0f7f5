"""Tables of pages, as data for the templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymix.report.figures.chart import Series
from raymix.report.formatting import ABSENT, Statistic, difference, is_significant


@dataclass(frozen=True, slots=True)
class TableHead:
    """A heading of a column or of a row."""

    label: str
    unit: str = ""
    series: Series | None = None
    """Adds the color that the charts of the page have for it."""


@dataclass(frozen=True, slots=True)
class TableCell:
    """A cell."""

    text: str
    emphasis: str = ""
    """CSS class: `good`, `warn` or `best`; empty for none."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row."""

    head: TableHead
    cells: Sequence[TableCell]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """A table with its title and a note below it."""

    title: str
    heads: Sequence[TableHead]
    """Of all columns, that of the rows' heads included."""
    rows: Sequence[TableRow]
    note: str = ""


def text_row(label: str, texts: Sequence[str]) -> TableRow:
    """Return a row of cells without emphasis."""
    return TableRow(TableHead(label), [TableCell(text) for text in texts])


def difference_cell(paired: Statistic | None, text: str | None = None) -> TableCell:
    """Return a paired difference, colored where its interval excludes 0.

    Args:
        paired: The difference.
        text: How it is written; left out, as mean and interval.
    """
    written = difference(paired) if text is None else text
    if paired is None or not is_significant(paired):
        return TableCell(written)
    return TableCell(written, "good" if paired["mean"] < 0 else "warn")


def best_cell(text: str, *, best: bool) -> TableCell:
    """Return a cell that stands out where it is the best of its column."""
    return TableCell(text, "best" if best and text != ABSENT else "")
