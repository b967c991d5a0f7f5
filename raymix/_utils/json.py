"""JSON in and out: strict reading of files by others, and values that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is none, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        # Not a ValueError by itself, so callers that guard against bad files would miss it.
        raise ValueError("nested too deeply") from None


def jsonable(value: Any) -> Any:
    """Return `value` in JSON types: numpy scalars and paths plain, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def rounded(value: float | None, digits: int = 6) -> float | None:
    """Return `value` to `digits` significant digits; None if it is None or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
