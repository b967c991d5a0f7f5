"""A small recipe as data and as a file, for the tests of loading, commands and planning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

DOCUMENT: dict[str, Any] = {
    "name": "demo",
    "corpus": {
        "path": "corpora/demo",
        "domains": [
            {"name": "books", "train": "data/books.parquet"},
            {"name": "code", "train": ["data/*.jsonl", "s3://bucket/*.jsonl"]},
        ],
    },
    "mixer": {"kind": "static", "weights": {"books": 0.5, "code": 0.5}},
    "train": {"steps": 10},
}


def document(**sections: Any) -> dict[str, Any]:
    """Return the recipe's data with whole sections replaced."""
    return {**copy.deepcopy(DOCUMENT), **sections}


def write(path: Path, data: Any = None) -> Path:
    """Return the path of a recipe file made of `data`, or of text as it is."""
    text = data if isinstance(data, str) else yaml.safe_dump(data or DOCUMENT, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path
