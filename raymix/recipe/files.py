"""Recipe files as plain data: one YAML mapping per file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from raymix._utils.yaml import MAX_BYTES, parse_yaml
from raymix.errors import RecipeError, did_you_mean, format_problem


def read_mapping(path: str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        RecipeError: If the file cannot be read, is too large, not UTF-8, or not a mapping.
    """
    try:
        # Before reading: a data file named by mistake can be larger than memory.
        size = os.path.getsize(path)
        raw = Path(path).read_bytes() if size <= MAX_BYTES else b""
    except (OSError, ValueError) as error:
        raise RecipeError(_unreadable(path, error)) from None
    if size > MAX_BYTES:
        raise RecipeError.at(
            "recipe",
            path,
            f"{size:,} bytes is too large for a recipe",
            fix="Data belongs in files that it names",
        )
    try:
        # -sig drops the byte order mark that some Windows editors write.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder knows only bytes; editors show lines.
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError.at(
            "recipe",
            path,
            f"not UTF-8 text: byte {raw[error.start]:#04x} at line {line}",
            fix="A recipe is a YAML file",
        ) from None
    data = parse_yaml(text, name="recipe", value=path)
    if not isinstance(data, dict):
        content = "is empty" if data is None else f"holds a {type(data).__name__}, not a mapping"
        raise RecipeError.at(
            "recipe", path, f"the file {content}", fix="Write a new one with `raymix init FILE`"
        )
    return data


def _unreadable(path: str, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        folder = os.path.dirname(path) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        # Only YAML files: the nearest name may be a run directory.
        recipes = [name for name in names if name.endswith((".yaml", ".yml"))]
        near = did_you_mean(os.path.basename(path), recipes)
        return format_problem("recipe", path, "no such file", fix=near)
    if isinstance(error, IsADirectoryError):
        return format_problem("recipe", path, "a directory", fix="Name the YAML file in it")
    reason = error.strerror if isinstance(error, OSError) else error
    return format_problem("recipe", path, f"cannot be read: {reason}")
