"""Mixture tables: the shares and losses of the training runs.

Tidy CSV or Parquet, one row per run and checkpoint: `run`, `step` (optional), `share.<domain>`
columns that sum to 1, `loss.<target>` columns in nats per token; an empty loss was not measured.
Other columns are ignored.

Shapes: R rows, D domains, V targets.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import LawError, did_you_mean, format_problem, join_sentences
from raymix.store import atomic_write_text

Floats = NDArray[np.float64]

SUM_TOLERANCE = 1e-3
"""Largest deviation of a row's sum of shares from 1; shares are then divided by their sum."""
# A wrong unit makes each row wrong: twenty messages show the pattern, ten thousand hide it.
_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureTable:
    """Validated shares and losses of R rows."""

    domains: tuple[str, ...]
    """Names of the D domains."""
    targets: tuple[str, ...]
    """Names of the V losses."""
    runs: tuple[str, ...]
    """Run name of each row."""
    share_RD: Floats
    """Shares of tokens, >= 0, each row summing to 1, shape (R, D)."""
    loss_RV: Floats
    """Losses in nats per token, > 0; NaN where not measured; shape (R, V)."""
    step_R: Floats | None = None
    """Steps (or tokens, one unit for all rows) at which the loss was measured, > 0, shape (R,)."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.runs)

    @property
    def run_count(self) -> int:
        """Return the number of distinct runs."""
        return len(set(self.runs))

    @property
    def has_steps(self) -> bool:
        """Return whether the rows have more than one distinct step."""
        return self.step_R is not None and np.unique(self.step_R).size > 1

    def rows(self, chosen_R: NDArray[Any]) -> MixtureTable:
        """Return the table of the selected rows: a mask, shape (R,), or row indices."""
        at = np.flatnonzero(chosen_R) if chosen_R.dtype == np.bool_ else chosen_R
        return MixtureTable(
            domains=self.domains,
            targets=self.targets,
            runs=tuple(self.runs[int(i)] for i in at),
            share_RD=self.share_RD[at],
            loss_RV=self.loss_RV[at],
            step_R=None if self.step_R is None else self.step_R[at],
        )

    def with_targets(self, names: Sequence[str]) -> MixtureTable:
        """Return the table with these losses only.

        Raises:
            LawError: If a name is not a loss of the table.
        """
        for name in names:
            if name not in self.targets:
                known = f"The table has: {', '.join(self.targets)}"
                suggestion = did_you_mean(name, self.targets)
                raise LawError.at(
                    "target", name, "not a loss of the table", allowed=known, fix=suggestion
                )
        at = [self.targets.index(name) for name in names]
        return MixtureTable(
            domains=self.domains,
            targets=tuple(names),
            runs=self.runs,
            share_RD=self.share_RD,
            loss_RV=self.loss_RV[:, at],
            step_R=self.step_R,
        )

    def last_rows(self) -> MixtureTable:
        """Return the last measured row of each run."""
        if self.step_R is None:
            return self
        last: dict[str, int] = {}
        for row, run in enumerate(self.runs):
            if run not in last or self.step_R[row] > self.step_R[last[run]]:
                last[run] = row
        # Sorted row numbers keep the order of the table, whatever the order of its steps.
        return self.rows(np.array(sorted(last.values())))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV, atomically."""
        # csv ends lines with CRLF by default. repr is the shortest text that reads back as the
        # same float64; 15 digits keep step counts free of a trailing `.0`.
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        step = [] if self.step_R is None else ["step"]
        shares = [f"share.{name}" for name in self.domains]
        writer.writerow(["run", *step, *shares, *(f"loss.{name}" for name in self.targets)])
        for row, run in enumerate(self.runs):
            steps = [] if self.step_R is None else [f"{self.step_R[row]:.15g}"]
            losses = ["" if np.isnan(loss) else repr(float(loss)) for loss in self.loss_RV[row]]
            writer.writerow([run, *steps, *map(repr, map(float, self.share_RD[row])), *losses])
        atomic_write_text(os.fspath(path), text.getvalue())


def read_table(
    path: str | os.PathLike[str], *, where: Mapping[str, str] | None = None
) -> MixtureTable:
    """Return the mixture table of a CSV or Parquet file, or of its file-system URL.

    Args:
        path: The file.
        where: Keep only rows with these values, compared as text, in these columns.

    Raises:
        LawError: If the file cannot be read or a row is invalid; up to twenty faults at once,
            each with its row (the header is row 1) and column.
    """
    name = os.fspath(path)
    try:
        header, columns = _columns(name)
    except (OSError, ValueError, UnicodeDecodeError, csv.Error) as error:
        raise LawError.at("table", name, f"cannot be read: {error}") from error
    table = dict(zip(header, columns, strict=True))
    row_ids = list(range(len(columns[0]))) if columns else []
    for column, value in (where or {}).items():
        if column not in table:
            suggestion = did_you_mean(column, header)
            raise LawError.at("where", column, f"not a column of {name}", fix=suggestion)
        row_ids = [row for row in row_ids if str(table[column][row]) == value]
        if not row_ids:
            values = ", ".join(dict.fromkeys(map(str, table[column])))[:200]
            raise LawError.at(
                "where",
                value,
                f"no row of {name} has it in column {column}",
                allowed=f"There is: {values}",
            )
    selected = {column: [cells[row] for row in row_ids] for column, cells in table.items()}
    return make_table(selected, name=name, lines=[row + 2 for row in row_ids])


def make_table(
    columns: Mapping[str, Sequence[Any]], *, name: str = "table", lines: Sequence[int] | None = None
) -> MixtureTable:
    """Return the validated table of columns by name; empty text and None are missing values.

    Args:
        columns: Cells by column, all of one length.
        name: Name of the table in messages.
        lines: Row numbers in messages; default: from 2, after a header.

    Raises:
        LawError: If a row is invalid, as for `read_table`.
    """
    domains = tuple(column[6:] for column in columns if column.startswith("share."))
    targets = tuple(column[5:] for column in columns if column.startswith("loss."))
    if not domains or not targets:
        kind = "share.<domain>" if not domains else "loss.<target>"
        column_names = ", ".join(list(columns)[:8]) or "no columns"
        allowed = "Columns share.<domain> and loss.<target> are needed"
        raise LawError.at(name, column_names, f"no {kind} column", fix=allowed)
    if not len(columns[f"share.{domains[0]}"]):
        raise LawError.at(
            "table",
            name,
            "has columns but no rows",
            fix="Each run is a row: its shares, its losses",
        )
    faults = _TableFaults(name, lines)
    share_RD = np.stack([_numbers(columns, f"share.{d}", faults) for d in domains], axis=1)
    loss_RV = np.stack(
        [_numbers(columns, f"loss.{t}", faults, missing=True) for t in targets], axis=1
    )
    step_R = _numbers(columns, "step", faults) if "step" in columns else None
    given = columns.get("run", range(1, len(share_RD) + 1))
    runs = tuple("" if run is None else str(run) for run in given)
    # Cells that are no numbers hold 1.0 or NaN by now, so checks of sums would add false faults.
    faults.raise_if_any()
    share_RD = _checked_shares(share_RD, domains, faults)
    _check_losses(loss_RV, targets, faults)
    _check_rows(runs, share_RD, step_R, faults)
    faults.raise_if_any()
    return MixtureTable(
        domains=domains,
        targets=targets,
        runs=runs,
        share_RD=share_RD,
        loss_RV=loss_RV,
        step_R=step_R,
    )


class _TableFaults:
    """Messages on invalid cells of a table; the header is row 1."""

    def __init__(self, name: str, lines: Sequence[int] | None) -> None:
        self.name = name
        self._lines = lines
        self._messages: list[str] = []
        self._suppressed_count = 0

    def line(self, row: int) -> int:
        """Return the row number in messages of data row `row`, counted from 0."""
        return row + 2 if self._lines is None else self._lines[row]

    def add(self, row: int, column: str, value: object, problem: str, *fix: str) -> None:
        """Add a message on data row `row`, counted from 0."""
        if len(self._messages) == _MAX_FAULTS:
            self._suppressed_count += 1
            return
        self._messages.append(
            format_problem(
                f"{self.name}: row {self.line(row)}, column {column}",
                value,
                problem,
                fix=join_sentences(*fix),
            )
        )

    def raise_if_any(self) -> None:
        """Raise all messages as one error, if there are any."""
        if self._messages:
            suppressed = (
                [f"... and {self._suppressed_count} more faults"] if self._suppressed_count else []
            )
            raise LawError(*self._messages, *suppressed)


def _columns(name: str) -> tuple[list[str], list[Sequence[Any]]]:
    # Imported where needed: a CSV does not need pyarrow, and its import takes a noticeable time.
    if name.endswith((".parquet", ".pq")):
        import pyarrow.parquet as pq

        table = pq.read_table(name)
        return table.column_names, [column.to_pylist() for column in table.columns]
    import fsspec

    # utf-8-sig drops the byte order mark that spreadsheets write in front of the first column.
    with fsspec.open(name, "r", encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError("it is empty")
    header = [cell.strip() for cell in rows[0]]
    duplicates = sorted({column for column in header if header.count(column) > 1})
    if duplicates:
        raise ValueError(f"column {duplicates[0]!r} appears twice")
    # csv.reader pads nothing: a lost comma would shift all losses of a row by one column.
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
    return header, [[row[i] for row in rows[1:]] for i in range(len(header))]


def _numbers(
    columns: Mapping[str, Sequence[Any]],
    column: str,
    faults: _TableFaults,
    *,
    missing: bool = False,
) -> Floats:
    values = columns[column]
    numbers = np.empty(len(values))
    for row, value in enumerate(values):
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty and missing:
            numbers[row] = np.nan
            continue
        try:
            numbers[row] = float("nan") if empty else float(value)
        except (TypeError, ValueError):
            faults.add(row, column, value, "not a number")
            numbers[row] = 1.0  # any finite number: the cell has its message already
            continue
        if not np.isfinite(numbers[row]):
            problem = "missing" if empty else "not finite"
            faults.add(row, column, value, problem, "Remove the row, or leave a loss empty")
    return numbers


def _checked_shares(share_RD: Floats, domains: Sequence[str], faults: _TableFaults) -> Floats:
    for row, at in zip(*np.nonzero((share_RD < 0) | (share_RD > 1 + SUM_TOLERANCE)), strict=True):
        value = float(share_RD[row, at])
        faults.add(int(row), f"share.{domains[at]}", value, "not a share", "Allowed: 0 to 1")
    # A share of 1e308 has its message above; its sum need not warn.
    with np.errstate(over="ignore"):
        total_R = share_RD.sum(axis=1)
    for row in np.flatnonzero(np.abs(total_R - 1) > SUM_TOLERANCE):
        total = round(float(total_R[row]), 6)
        faults.add(int(row), "share.*", total, "the shares do not sum to 1")
    return share_RD / np.where(total_R > 0, total_R, 1.0)[:, None]


def _check_losses(loss_RV: Floats, targets: Sequence[str], faults: _TableFaults) -> None:
    for row, at in zip(*np.nonzero(loss_RV <= 0), strict=True):
        value = float(loss_RV[row, at])
        faults.add(int(row), f"loss.{targets[at]}", value, "not a loss", "Allowed: above 0")
    # Row 0 stands for the column: the fault is in no single row.
    for at in np.flatnonzero(np.isnan(loss_RV).all(axis=0)):
        faults.add(0, f"loss.{targets[int(at)]}", None, "measured in no row")


def _check_rows(
    runs: Sequence[str], share_RD: Floats, step_R: Floats | None, faults: _TableFaults
) -> None:
    """Check for duplicate rows, invalid steps, and runs whose shares change."""
    first_row: dict[tuple[str, float], int] = {}
    start_row: dict[str, int] = {}
    for row, run in enumerate(runs):
        step = 0.0 if step_R is None else float(step_R[row])
        if step_R is not None and step <= 0:
            faults.add(row, "step", step, "not a step", "Allowed: above 0")
        duplicate_of = first_row.setdefault((run, step), row)
        if duplicate_of != row:
            where = f"the same run and step as row {faults.line(duplicate_of)}"
            faults.add(row, "run", run, where, "Keep one of them, or name the runs apart")
            continue
        start = start_row.setdefault(run, row)
        if np.abs(share_RD[row] - share_RD[start]).max() > SUM_TOLERANCE:
            problem = f"other shares than in row {faults.line(start)} of the same run"
            faults.add(row, "share.*", run, problem, "Laws model runs with constant shares")
