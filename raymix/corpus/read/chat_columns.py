"""Columns of conversations: the messages, and beside them the tools and the system turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat

import pyarrow as pa

from raymix.recipe import DomainConfig

_DEFAULT_TOOLS = "tools"
_DEFAULT_SYSTEM = "system"


def chat_columns(domain: DomainConfig, names: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the columns of the tools and of the system turns, None for none.

    Those of the recipe, else `tools` and `system` where they are among `names`.
    """
    if domain.messages_column is None:
        return None, None
    present = set(names)
    given = (domain.tools_column, _DEFAULT_TOOLS), (domain.system_column, _DEFAULT_SYSTEM)
    # An empty name is none.
    tools, system = (
        (default if default in present else None) if column is None else column or None
        for column, default in given
    )
    return tools, system


def chat_rows(
    messages: pa.Array, tools: pa.Array | None, system: pa.Array | None
) -> Iterator[tuple[object, object, object]]:
    """Yield messages, tools and system turn of each row, as Python has them; None for none."""
    # A map would be a list of pairs, which no template takes for one.
    offered = repeat(None) if tools is None else tools.to_pylist(maps_as_pydicts="strict")
    turns = repeat(None) if system is None else system.to_pylist()
    yield from zip(messages.to_pylist(maps_as_pydicts="strict"), offered, turns, strict=False)
