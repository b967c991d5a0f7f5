"""Identifying fields of a recipe: recipes of one run may differ in the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

# Fields that may change when a run is resumed: they change neither batches nor mathematics beyond
# rounding. The corpus is identified by its fingerprint, which is in every checkpoint, not by paths.
_FREE_FIELDS = (
    "name",
    "corpus",
    "cluster",
    "eval",
    "run",
    "tune",
    "specialists",
    "data.accept_changed_corpus",
    "data.assign",
    "data.cache_bytes",
    "model.lora.export",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.micro_batch_rows",
    "train.parallel",
    "train.compile",
    "train.activation_checkpointing",
)


LENGTH_FIELDS = frozenset({"train.steps", "train.tokens"})
"""Fields that decide how long a run is."""


def identity(document: dict[str, Any]) -> dict[str, Any]:
    """Return the identifying fields of a recipe's document, by dotted path."""
    flat = dict(_flat(document, ""))
    return {path: value for path, value in flat.items() if not below(path, _FREE_FIELDS)}


def below(path: str, fields: Iterable[str]) -> bool:
    """Return whether a dotted path is one of the fields, or below one."""
    return any(path == field or path.startswith(f"{field}.") for field in fields)


def domain_names(document: dict[str, Any]) -> list[str]:
    """Return the names of the domains in a recipe's document."""
    return [domain["name"] for domain in document["corpus"]["domains"]]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `path: old -> new` for every field that differs, in order of path."""
    absent = "absent"
    return [
        f"{path}: {old.get(path, absent)!r} -> {new.get(path, absent)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path, absent) != new.get(path, absent)
        # Filled in when a run starts, so a recipe as it was written lacks it.
        and not (path == "model.commit" and new.get(path) is None)
    ]


def _flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    # An empty mapping is a value: without it, setting the field to {} would be no difference.
    if isinstance(node, dict) and node:
        for key, item in node.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
