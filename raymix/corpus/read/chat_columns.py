"""Columns of files that hold conversations: the messages, and beside them the tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat

import pyarrow as pa

from raymix.recipe import DomainConfig

_DEFAULT_TOOLS = "tools"


def tools_column(domain: DomainConfig, names: Iterable[str]) -> str | None:
    """Return the column of the tools: the recipe's, else `tools` if it is among `names`."""
    if domain.messages_column is None or domain.tools_column is not None:
        # An empty name is none.
        return domain.tools_column or None
    return _DEFAULT_TOOLS if _DEFAULT_TOOLS in names else None


def chat_rows(messages: pa.Array, tools: pa.Array | None) -> Iterator[tuple[object, object]]:
    """Yield the messages and the tools of each row, as Python has them; None where it has none."""
    # A map would be a list of pairs, which no template takes for one.
    offered = repeat(None) if tools is None else tools.to_pylist(maps_as_pydicts="strict")
    yield from zip(messages.to_pylist(maps_as_pydicts="strict"), offered, strict=False)
