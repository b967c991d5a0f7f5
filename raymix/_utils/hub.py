"""Names of repositories of the Hugging Face Hub, and the URLs that stand for them."""

from __future__ import annotations

import re

HUB = "hf://"
"""Prefix of the URLs of repositories and of their files."""

# The Hub's rule: at most one slash; letters, digits and -_. that neither begin nor end a part.
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
# Endings that only files have; the Hub forbids .git itself.
_FILE_ENDINGS = (".json", ".git", ".yaml", ".yml", ".jinja")


def is_hub_name(text: str) -> bool:
    """Return whether `text` could name a repository of the Hub: `gpt2`, `Qwen/Qwen3-0.6B`."""
    doubled = "--" in text or ".." in text
    return bool(_NAME.fullmatch(text)) and not doubled and not text.endswith(_FILE_ENDINGS)
