"""Overrides of single fields: `train.steps=200`, `corpus.domains.0.name=books`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from raymix._utils.yaml import parse_yaml
from raymix.errors import RecipeError
from raymix.recipe.describe import FieldSpec, tag_of
from raymix.recipe.document import Recipe
from raymix.recipe.plugins import OpenUnion, PluginMixer
from raymix.recipe.translate import brief


def apply_overrides(
    data: Mapping[str, Any],
    overrides: Sequence[str],
    root: type[BaseModel] = Recipe,
    *,
    change: Callable[[str, Any], Any] = lambda _, value: value,
) -> dict[str, Any]:
    """Return the data of a recipe with every override applied, in order.

    Args:
        data: The data.
        overrides: `FIELD=VALUE`, the values in YAML.
        root: The model that the data are of.
        change: Function of a field's dotted path and its new value, which returns the value to set.

    Raises:
        RecipeError: With one message per override that cannot be read or placed.
    """
    # The caller may apply other overrides to the same data (a search does, per trial).
    changed = copy.deepcopy(dict(data))
    problems: list[str] = []
    for override in overrides:
        try:
            path, value = split_override(override)
            _place(changed, FieldSpec(root), path.split("."), change(path, value), at="")
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(*problems)
    return changed


def split_override(override: str) -> tuple[str, Any]:
    """Return the dotted path and the value of an override.

    Raises:
        RecipeError: If it is not `FIELD=VALUE`, or the value is no YAML.
    """
    path, equals, text = (part.strip() for part in override.partition("="))
    # `a..b=1` and `=1` would otherwise create fields with empty names.
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
        # These begin YAML on purpose; taken as text, the mistake would surface far away.
        if text[:1] in ("{", "[", '"', "'"):
            raise
        # `*.txt` is an alias and `a: b` a mapping to YAML; on a command line both are plain text.
        return path, text


def _place(node: Any, spec: FieldSpec, keys: Sequence[str], value: Any, *, at: str) -> None:
    """Set the value below `node`, creating missing mappings on the way.

    Args:
        node: The data to change: a mapping or a list.
        spec: Specification of `node`.
        keys: The rest of the path.
        value: The new value.
        at: The dotted path of `node`, for messages.
    """
    key, taken = _next_key(node, keys, at)
    rest = keys[taken:]
    if isinstance(node, list):
        node.extend([{}] * (key == len(node)))  # an index of one more than the last appends
    elif not rest and key == spec.discriminator and node.get(key) != value:
        drop_fields(node, spec, value)
    if not rest:
        node[key] = value
        return
    # `train:` with nothing below it is None, and takes fields like a missing section.
    if isinstance(node, dict) and node.get(key) is None:
        node[key] = {}
    below = union_member(spec, node).child(key) or FieldSpec(Any)
    _place(node[key], below, rest, value, at=f"{at}.{key}" if at else str(key))


def _next_key(node: Any, keys: Sequence[str], at: str) -> tuple[Any, int]:
    """Return the next key and how many parts of the path it takes: a name may hold dots."""
    if isinstance(node, dict):
        joined = (".".join(keys[:taken]) for taken in range(len(keys), 0, -1))
        # The longest match first: `mixer.weights.en.wiki` may name the domain `en.wiki`.
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


def union_member(spec: FieldSpec, node: Any) -> FieldSpec:
    """Return the alternative of a union that `node` selects."""
    members = spec.members()
    tag = node.get(spec.discriminator) if isinstance(node, dict) else None
    # A wrong tag is left to validation, which names it.
    return next((m for m in members if tag_of(m, spec) == tag), members[0])


def drop_fields(node: dict[str, Any], union: FieldSpec, tag: object) -> None:
    """Drop the fields that the old kind has and the new one has not; others may be typos."""
    models = {tag_of(member, union): member.model for member in union.members()}
    old, new = (models.get(str(kind)) for kind in (node.get(union.discriminator or ""), tag))
    plugins = [m for m in union.metadata if isinstance(m, OpenUnion)]
    remaining = {*PluginMixer.model_fields} if any(m.knows(tag) for m in plugins) else set()
    remaining |= {*new.model_fields} if new is not None else set()
    if not remaining:
        return
    # The fields of another package's kind are not known here, so all of them go.
    known = old.model_fields.keys() if old is not None else set(node)
    for key in known - remaining:
        node.pop(key, None)
