"""Fit a law in one call; save and load fitted laws as JSON files."""

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
    """Return a law fitted to a mixture table, and its report.

    Args:
        table: The table, or its path.
        law: Kind of law; `auto` selects the one with the smallest held-out error.
        targets: Losses to predict; default: all losses of the table.
        options: Options of the law.

    Raises:
        LawError: If the table or the law cannot be used.
    """
    mixture_table = table if isinstance(table, MixtureTable) else read_table(table)
    fitted = build_law(law, **options)
    report = fitted.fit(mixture_table if targets is None else mixture_table.with_targets(targets))
    return fitted, report


def save_law(path: str | os.PathLike[str], fitted: Law, report: FitReport | None = None) -> None:
    """Write a fitted law and its report as JSON, atomically."""
    # json writes each float by its shortest repr, so a loaded law predicts the same bits. NaN is
    # no JSON, and other readers would refuse the file.
    text = json.dumps(law_to_dict(fitted, report), ensure_ascii=False, allow_nan=False)
    atomic_write_text(os.fspath(path), text + "\n")


def load_law(path: str | os.PathLike[str]) -> Law:
    """Return the law of a file written by `save_law`.

    Raises:
        LawError: If the file cannot be read or holds no law.
    """
    try:
        document = parse_json(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LawError.at("law", os.fspath(path), f"cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise LawError.at("law", os.fspath(path), "not a law", fix="Make one with `raymix fit`")
    return law_from_dict(document)
