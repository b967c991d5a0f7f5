"""Paths in a recipe: the fields that hold them, and where relative ones start.

One rule holds for every path, of sources and of results: a relative path in a file starts at the
directory of that file; one that is typed on the command line (`FIELD=VALUE`), or that stands in a
recipe without a file, starts at the working directory. URLs stay as they are.

`model.path` and `corpus.tokenizer` may be names of the Hugging Face Hub. An existing file or
directory of that name wins; else the name becomes the URL `hf://NAME`, so that it means the same
wherever the recipe is loaded again.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from raymix._utils.hub import HUB, is_hub_name

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

_Node = TypeVar("_Node")


@dataclass(frozen=True, slots=True)
class PathField:
    """A field of the recipe that holds a path, or a list of paths."""

    field: str
    """Dotted path; `*` stands for every entry of a list."""
    role: Literal["source", "input", "result"] = "source"
    """`input`: what another run may have written; it need not exist before a job runs."""
    is_glob: bool = False
    is_template: bool = False
    """Whether names in braces are filled in."""
    on_hub: bool = False
    """Whether it may be a name of the Hub."""
    words: tuple[str, ...] = ()
    """Values that are no paths."""


PATH_FIELDS = (
    PathField("corpus.path", "result"),
    # A tokenizer may be written as its path alone.
    PathField("corpus.tokenizer", on_hub=True, words=("byte",)),
    PathField("corpus.tokenizer.path", on_hub=True),
    PathField("corpus.chat_template", words=("chatml",)),
    PathField("corpus.domains.*.train", is_glob=True),
    PathField("corpus.domains.*.valid", is_glob=True),
    PathField("data.assign.cost", "input"),
    PathField("mixer.log", "input"),
    PathField("mixer.bases"),
    PathField("model.path", "input", on_hub=True),
    PathField("run.dir", "result", is_template=True),
)
"""Every field of a recipe that holds paths."""

# Mappings of other fields of the recipe, by dotted path or nested.
_CHANGES = (("tune", "proxy"), ("specialists", "finetune"))

PathChange = Callable[[str, PathField, str], str]
"""Function of a path, its field, and its own dotted path, which returns the path to put there."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    # Two letters or more before the colon: `C:/` is a drive.
    return bool(_URL.match(path))


def absolute(path: str, field: PathField, base: str) -> str:
    """Return a path made absolute from the directory `base`, its `~` filled in; a URL unchanged."""
    moved = move(path, field, base, base)
    if moved in field.words or is_url(moved):
        return moved
    return os.path.normpath(os.path.expanduser(moved))


def move(path: str, field: PathField, start: str, prefix: str) -> str:
    """Return a path that starts at the directory `start` with `prefix` before it.

    URLs, absolute paths and those from a home directory stay as they are; a name of the Hub that is
    no file or directory at `start` becomes a URL.
    """
    if path in field.words or is_url(path) or path.startswith(("/", "~")):
        return path
    if on_hub(path, field, start):
        return HUB + path
    if prefix == ".":
        return path
    # Names of the directories in between are literal, even where the path is a pattern.
    if field.is_glob:
        prefix = glob.escape(prefix)
    elif field.is_template:
        prefix = prefix.replace("{", "{{").replace("}", "}}")
    moved = os.path.normpath(os.path.join(prefix, path))
    # `./gpt2` and `./byte` are paths, and stay so.
    is_word = moved in field.words or (field.on_hub and is_hub_name(moved))
    return f"./{moved}" if is_word else moved


def on_hub(path: str, field: PathField, start: str) -> bool:
    """Return whether a path as written means a repository of the Hub, seen from `start`."""
    if not field.on_hub or path in field.words or not is_hub_name(path):
        return False
    return not os.path.exists(os.path.join(start, path))


def map_paths(recipe: _Node, change: PathChange) -> _Node:
    """Return a recipe, or its data as read from a file, with `change` applied to every path."""
    for field in PATH_FIELDS:
        recipe = _map(recipe, field.field.split("."), field, change, "")
    for keys in _CHANGES:
        recipe = _map_changes(recipe, keys, change, "")
    return recipe


def map_override(path: str, value: Any, change: PathChange) -> Any:
    """Return the value of an override of the field `path`, `change` applied to the paths in it."""
    keys = path.split(".")
    for nested in _CHANGES:
        if tuple(keys[:2]) == nested and len(keys) > len(nested):
            return map_override(".".join(keys[2:]), value, change)
        if tuple(keys) == nested[: len(keys)]:
            value = _map_changes(value, nested[len(keys) :], change, path)
    for field in PATH_FIELDS:
        pattern = field.field.split(".")
        # One key more than the field has: an entry of its list.
        given = keys[:-1] if len(keys) == len(pattern) + 1 and keys[-1].isdecimal() else keys
        if len(given) <= len(pattern) and all(
            part in ("*", key) for key, part in zip(given, pattern, strict=False)
        ):
            value = _map(value, pattern[len(given) :], field, change, path)
    return value


def _map(node: Any, keys: list[str], field: PathField, change: PathChange, at: str) -> Any:
    """Return `node` with `change` applied to the paths at `keys` below it."""
    if isinstance(node, tuple):
        return tuple(_map(list(node), keys, field, change, at))
    if isinstance(node, list):
        # `*` or, at the end, the list of paths itself.
        if keys and keys[0] != "*":
            return node
        return [_map(n, keys[1:], field, change, f"{at}.{i}") for i, n in enumerate(node)]
    if not keys:
        return change(node, field, at) if isinstance(node, str) else node
    key = keys[0]
    # A model of another kind of the section, or data without the field.
    if isinstance(node, BaseModel):
        known = key in type(node).model_fields
        old = getattr(node, key) if known else None
    else:
        known = isinstance(node, dict) and key in node
        old = node[key] if known else None
    if not known:
        return node
    new = _map(old, keys[1:], field, change, f"{at}.{key}" if at else key)
    return _replaced(node, key, old, new)


def _replaced(node: Any, key: str, old: Any, new: Any) -> Any:
    # Untouched where nothing changed: a copy would count a field as set by the user.
    if new == old:
        return node
    if isinstance(node, BaseModel):
        return node.model_copy(update={key: new})
    return {**node, key: new}


def _map_changes(node: Any, keys: tuple[str, ...], change: PathChange, at: str) -> Any:
    """Return `node` with `change` applied to the fields of a recipe that stand below `keys`."""
    if not keys:
        if not isinstance(node, dict):
            return node
        return {key: map_override(str(key), value, change) for key, value in node.items()}
    key, rest = keys[0], keys[1:]
    if isinstance(node, BaseModel):
        old = getattr(node, key)
    elif isinstance(node, dict) and key in node:
        old = node[key]
    else:
        return node
    return _replaced(node, key, old, _map_changes(old, rest, change, f"{at}.{key}"))
