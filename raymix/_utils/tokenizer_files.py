"""Files of Hugging Face tokenizers beside a model."""

from __future__ import annotations

import json
from pathlib import Path

from raymix._utils.json import parse_json

# transformers writes int(1e30) for a tokenizer without a limit.
_NO_LIMIT = 10**12


def limit_tokenizer(path: Path, tokens: int | None, *, keep: bool = False) -> None:
    """Write the number of tokens that a model takes into its `tokenizer_config.json`, if any.

    Args:
        path: The file.
        tokens: The number; None if it is not known, which changes nothing.
        keep: Whether a number that is there stays, but for the 1e30 that means none.
    """
    if tokens is None or not path.exists():
        return
    document = parse_json(path.read_text("utf-8"))
    given = document.get("model_max_length") if isinstance(document, dict) else 0
    if not isinstance(document, dict) or (keep and isinstance(given, int) and given < _NO_LIMIT):
        return
    document["model_max_length"] = tokens
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
