"""Changes of single fields: `train.steps=200`, `corpus.domains.0.name=books`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from raymix._utils.yaml import parse_yaml
from raymix.errors import RecipeError
from raymix.recipe.describe import Spot, tag_of
from raymix.recipe.document import Recipe
from raymix.recipe.plugins import OpenTo, PluginMixer
from raymix.recipe.translate import brief


def apply_overrides(
    data: Mapping[str, Any], overrides: Sequence[str], root: type[BaseModel] = Recipe
) -> dict[str, Any]:
    """Return the data of a recipe (of a `root`) with every override applied, in order.

    Raises:
        RecipeError: With one message per override that cannot be read or placed.
    """
    changed = copy.deepcopy(dict(data))
    problems: list[str] = []
    for override in overrides:
        try:
            path, value = _split(override)
            _place(changed, Spot(root), path.split("."), value, at="")
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(*problems)
    return changed


def _split(override: str) -> tuple[str, Any]:
    path, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(path.split(".")):
        raise RecipeError.at(
            "override",
            override,
            "not a change of a field",
            fix="Write FIELD=VALUE, e.g. train.steps=200",
        )
    try:
        return path, parse_yaml(text, name=path, value=text)
    except RecipeError:
        if text[:1] in ("{", "[", '"', "'"):
            raise
        return path, text  # such as `*.txt`, which YAML takes for an alias


def _place(node: Any, spot: Spot, keys: Sequence[str], value: Any, *, at: str) -> None:
    """Set the value below `node`, making the mappings on the way that are not there.

    Args:
        node: The data to change: a mapping or a list.
        spot: What may stand at `node`.
        keys: The rest of the path.
        value: The new value.
        at: The dotted path of `node`, for messages.
    """
    key, taken = _next_key(node, keys, at)
    rest = keys[taken:]
    if isinstance(node, list):
        node.extend([{}] * (key == len(node)))
    elif not rest and key == spot.discriminator and node.get(key) != value:
        drop_fields(node, spot, value)
    if not rest:
        node[key] = value
        return
    if isinstance(node, dict) and node.get(key) is None:
        node[key] = {}
    below = union_member(spot, node).child(key) or Spot(Any)
    _place(node[key], below, rest, value, at=f"{at}.{key}" if at else str(key))


def _next_key(node: Any, keys: Sequence[str], at: str) -> tuple[Any, int]:
    """Return the next key and how many parts of the path it takes: a name may hold dots."""
    if isinstance(node, dict):
        joined = (".".join(keys[:taken]) for taken in range(len(keys), 0, -1))
        key = next((name for name in joined if name in node), keys[0])
        return key, key.count(".") + 1
    path = ".".join([at, *keys])
    if not isinstance(node, list):
        wrong = f"{at} is {brief(node)!r}, which has no fields"
    elif not keys[0].isdecimal() or int(keys[0]) > len(node):
        wrong = f"{at} is a list of {len(node)}: the index may be 0 to {len(node)}"
    else:
        return int(keys[0]), 1
    raise RecipeError.at("override", path, wrong, fix=f"Or set {at} as a whole")


def union_member(spot: Spot, node: Any) -> Spot:
    """Return the alternative of a union that `node` is meant for."""
    members = spot.members()
    tag = node.get(spot.discriminator) if isinstance(node, dict) else None
    return next((m for m in members if tag_of(m, spot) == tag), members[0])


def drop_fields(node: dict[str, Any], union: Spot, tag: object) -> None:
    """Drop the fields that the old kind has and the new one has not; others may be typos."""
    models = {tag_of(member, union): member.model for member in union.members()}
    old, new = (models.get(str(kind)) for kind in (node.get(union.discriminator or ""), tag))
    plugins = [m for m in union.metadata if isinstance(m, OpenTo)]
    kept = {*PluginMixer.model_fields} if any(m.knows(tag) for m in plugins) else set()
    kept |= {*new.model_fields} if new is not None else set()
    if not kept:
        return
    # What another package's kind has is not known: all of it goes.
    known = old.model_fields.keys() if old is not None else set(node)
    for key in known - kept:
        node.pop(key, None)
