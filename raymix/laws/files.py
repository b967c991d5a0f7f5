"""Fitting in one call, and fitted laws as files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymix._utils.json import parse_json
from raymix.errors import LawError
from raymix.laws.base import FitReport, Law, build_law, law_from_dict, law_to_dict
from raymix.laws.table import MixtureTable, read_table
from raymix.store import atomic_write_text


def fit_law(
    table: MixtureTable | str | os.PathLike[str],
    *,
    law: str = "auto",
    targets: Sequence[str] | None = None,
    **options: Any,
) -> tuple[Law, FitReport]:
    """Return a law fitted to a mixture table, and the report of the fit.

    Args:
        table: The table, or the path of one.
        law: Kind of law; `auto` takes the one that predicts runs left out best.
        targets: Losses to predict; left out, all of the table.
        options: For the law.

    Raises:
        LawError: If the table or the law cannot be used.
    """
    given = table if isinstance(table, MixtureTable) else read_table(table)
    fitted = build_law(law, **options)
    report = fitted.fit(given if targets is None else given.with_targets(targets))
    return fitted, report


def save_law(path: str | os.PathLike[str], fitted: Law, report: FitReport | None = None) -> None:
    """Write a fitted law and its report as JSON, under a temporary name first."""
    text = json.dumps(law_to_dict(fitted, report), ensure_ascii=False, allow_nan=False)
    atomic_write_text(os.fspath(path), text + "\n")


def load_law(path: str | os.PathLike[str]) -> Law:
    """Return the law in a file that `save_law` wrote.

    Raises:
        LawError: If there is none.
    """
    try:
        document = parse_json(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LawError.at("law", os.fspath(path), f"cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise LawError.at("law", os.fspath(path), "no law", fix="Make one with `raymix fit`")
    return law_from_dict(document)
