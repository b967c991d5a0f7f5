"""Mixture tables: what each run read, and the losses it came to.

Tidy CSV or Parquet, one row per run and checkpoint: `run`, `step` (optional), `share.<domain>`
columns that sum to 1, `loss.<target>` columns in nats per token; an empty loss was not measured.
Other columns are passed over. Shapes: R rows, D domains, V targets.
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
"""How far the shares of a row may be from 1; they are then divided by their sum."""
_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureTable:
    """R rows of shares and losses, checked."""

    domains: tuple[str, ...]
    """Names of the D domains."""
    targets: tuple[str, ...]
    """Names of the V losses."""
    runs: tuple[str, ...]
    """The run each row belongs to."""
    share_RD: Floats
    """Shares of tokens, >= 0, each row summing to 1, shape (R, D)."""
    loss_RV: Floats
    """Losses in nats per token, > 0; NaN where not measured; shape (R, V)."""
    step_R: Floats | None = None
    """Steps (or tokens: any one unit) trained when the loss was measured, > 0, shape (R,)."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.runs)

    @property
    def run_count(self) -> int:
        """Return how many different runs there are."""
        return len(set(self.runs))

    @property
    def has_steps(self) -> bool:
        """Return whether losses are known at more than one step."""
        return self.step_R is not None and np.unique(self.step_R).size > 1

    def rows(self, chosen_R: NDArray[Any]) -> MixtureTable:
        """Return the table of some rows: a mask or indices, shape (R,) or (n,)."""
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
        """Return the table of these losses only.

        Raises:
            LawError: If a name is no loss of the table.
        """
        for name in names:
            if name not in self.targets:
                known = f"The table has: {', '.join(self.targets)}"
                near = did_you_mean(name, self.targets)
                raise LawError.at("target", name, "no loss of the table", allowed=known, fix=near)
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
        """Return the row of each run that was measured last."""
        if self.step_R is None:
            return self
        last: dict[str, int] = {}
        for row, run in enumerate(self.runs):
            if run not in last or self.step_R[row] > self.step_R[last[run]]:
                last[run] = row
        return self.rows(np.array(sorted(last.values())))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write CSV."""
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
    """Return the mixture table in a CSV or Parquet file, or a file-system URL of one.

    Args:
        path: The file.
        where: Keep only rows with these values, as text, in these columns.

    Raises:
        LawError: If the file cannot be read or a row cannot be used; up to twenty faults at once,
            each naming its row (the header is row 1) and column.
    """
    name = os.fspath(path)
    try:
        head, columns = _columns(name)
    except (OSError, ValueError, UnicodeDecodeError, csv.Error) as error:
        raise LawError.at("table", name, f"cannot be read: {error}") from error
    table = dict(zip(head, columns, strict=True))
    kept = list(range(len(columns[0]))) if columns else []
    for column, value in (where or {}).items():
        if column not in table:
            near = did_you_mean(column, head)
            raise LawError.at("where", column, f"no column of {name}", fix=near)
        kept = [row for row in kept if str(table[column][row]) == value]
        if not kept:
            some = ", ".join(dict.fromkeys(map(str, table[column])))[:200]
            raise LawError.at(
                "where",
                value,
                f"no row of {name} has it in column {column}",
                allowed=f"There is: {some}",
            )
    chosen = {column: [cells[row] for row in kept] for column, cells in table.items()}
    return make_table(chosen, name=name, lines=[row + 2 for row in kept])


def make_table(
    columns: Mapping[str, Sequence[Any]], *, name: str = "table", lines: Sequence[int] | None = None
) -> MixtureTable:
    """Return the checked table of columns by name; empty text and None are missing values.

    Args:
        columns: Cells by column, all of one length.
        name: What messages call the table.
        lines: What messages call its rows; left out, they count from 2, after a header.

    Raises:
        LawError: As `read_table` does.
    """
    domains = tuple(column[6:] for column in columns if column.startswith("share."))
    targets = tuple(column[5:] for column in columns if column.startswith("loss."))
    if not domains or not targets:
        kind = "share.<domain>" if not domains else "loss.<target>"
        seen = ", ".join(list(columns)[:8]) or "no columns"
        need = "Needed are share.<domain> and loss.<target> columns"
        raise LawError.at(name, seen, f"no {kind} column", fix=need)
    if not len(columns[f"share.{domains[0]}"]):
        raise LawError.at(
            "table",
            name,
            "holds columns and no row",
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
    faults.stop()
    share_RD = _checked_shares(share_RD, domains, faults)
    _check_losses(loss_RV, targets, faults)
    _check_rows(runs, share_RD, step_R, faults)
    faults.stop()
    return MixtureTable(
        domains=domains,
        targets=targets,
        runs=runs,
        share_RD=share_RD,
        loss_RV=loss_RV,
        step_R=step_R,
    )


class _TableFaults:
    """Collects what is wrong with a table; rows are counted from the header's 1."""

    def __init__(self, name: str, lines: Sequence[int] | None) -> None:
        self.name = name
        self._lines = lines
        self._found: list[str] = []
        self._more = 0

    def line(self, row: int) -> int:
        """Return what a row of data, counted from 0, is called."""
        return row + 2 if self._lines is None else self._lines[row]

    def add(self, row: int, column: str, value: object, wrong: str, *advice: str) -> None:
        """Note a fault in a row of data, counted from 0."""
        if len(self._found) == _MAX_FAULTS:
            self._more += 1
            return
        self._found.append(
            format_problem(
                f"{self.name}: row {self.line(row)}, column {column}",
                value,
                wrong,
                fix=join_sentences(*advice),
            )
        )

    def stop(self) -> None:
        """Raise what was found, if anything."""
        if self._found:
            more = [f"... and {self._more} more faults"] if self._more else []
            raise LawError(*self._found, *more)


def _columns(name: str) -> tuple[list[str], list[Sequence[Any]]]:
    if name.endswith((".parquet", ".pq")):
        import pyarrow.parquet as pq

        table = pq.read_table(name)
        return table.column_names, [column.to_pylist() for column in table.columns]
    import fsspec

    with fsspec.open(name, "r", encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError("it is empty")
    head = [cell.strip() for cell in rows[0]]
    twice = sorted({column for column in head if head.count(column) > 1})
    if twice:
        raise ValueError(f"column {twice[0]!r} is there twice")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(head)}")
    return head, [[row[i] for row in rows[1:]] for i in range(len(head))]


def _numbers(
    columns: Mapping[str, Sequence[Any]],
    column: str,
    faults: _TableFaults,
    *,
    missing: bool = False,
) -> Floats:
    values = columns[column]
    found = np.empty(len(values))
    for row, value in enumerate(values):
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty and missing:
            found[row] = np.nan
            continue
        try:
            found[row] = float("nan") if empty else float(value)
        except (TypeError, ValueError):
            faults.add(row, column, value, "not a number")
            found[row] = 1.0
            continue
        if not np.isfinite(found[row]):
            wrong = "missing" if empty else "not finite"
            faults.add(row, column, value, wrong, "Remove the row, or leave a loss empty")
    return found


def _checked_shares(share_RD: Floats, domains: Sequence[str], faults: _TableFaults) -> Floats:
    for row, at in zip(*np.nonzero((share_RD < 0) | (share_RD > 1 + SUM_TOLERANCE)), strict=True):
        value = float(share_RD[row, at])
        faults.add(int(row), f"share.{domains[at]}", value, "no share", "Allowed: 0 to 1")
    with np.errstate(over="ignore"):
        total_R = share_RD.sum(axis=1)
    for row in np.flatnonzero(np.abs(total_R - 1) > SUM_TOLERANCE):
        total = round(float(total_R[row]), 6)
        faults.add(int(row), "share.*", total, "the shares do not sum to 1")
    return share_RD / np.where(total_R > 0, total_R, 1.0)[:, None]


def _check_losses(loss_RV: Floats, targets: Sequence[str], faults: _TableFaults) -> None:
    for row, at in zip(*np.nonzero(loss_RV <= 0), strict=True):
        value = float(loss_RV[row, at])
        faults.add(int(row), f"loss.{targets[at]}", value, "no loss", "Allowed: above 0")
    for at in np.flatnonzero(np.isnan(loss_RV).all(axis=0)):
        faults.add(0, f"loss.{targets[int(at)]}", None, "measured in no row")


def _check_rows(
    runs: Sequence[str], share_RD: Floats, step_R: Floats | None, faults: _TableFaults
) -> None:
    """Refuse rows that stand twice, steps that are none, and a run of two mixtures."""
    seen: dict[tuple[str, float], int] = {}
    first: dict[str, int] = {}
    for row, run in enumerate(runs):
        step = 0.0 if step_R is None else float(step_R[row])
        if step_R is not None and step <= 0:
            faults.add(row, "step", step, "no step", "Allowed: above 0")
        before = seen.setdefault((run, step), row)
        if before != row:
            where = f"the same run and step as row {faults.line(before)}"
            faults.add(row, "run", run, where, "Keep one of them, or name the runs apart")
            continue
        start = first.setdefault(run, row)
        if np.abs(share_RD[row] - share_RD[start]).max() > SUM_TOLERANCE:
            wrong = f"other shares than in row {faults.line(start)} of the same run"
            faults.add(row, "share.*", run, wrong, "Laws are for shares that stay as they are")
