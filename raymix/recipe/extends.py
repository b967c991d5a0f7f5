"""Recipes that start from another recipe: `extends: base.yaml`.

The file is read first, then the one that extends it is laid over it, section by section:

- fields of a section are merged, and the extending file wins;
- a section of another `kind` drops the fields that only the old kind has, as an override does;
- lists of mappings with a `name` (`corpus.domains`) are merged by name, and new names are appended;
  a list of bare names selects those entries of the base, in that order;
- any other list, and any mapping of shares or numbers by domain, is replaced as a whole.

Relative paths start at the file that names them, so those of a base in another directory are
rewritten to start at the extending file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import Discriminator

from raymix.errors import RecipeError, did_you_mean, format_problem
from raymix.recipe.describe import FieldSpec
from raymix.recipe.document import Recipe
from raymix.recipe.files import read_mapping
from raymix.recipe.overrides import drop_fields, union_member
from raymix.recipe.paths import map_paths, move

KEY = "extends"


def read_layers(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the files that make up a recipe as (path, data), the recipe first, then its bases.

    Raises:
        RecipeError: If a file cannot be read, or a file extends itself through others.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    chain: list[str] = []
    while True:
        data = read_mapping(path) if not layers else _read_base(layers[-1][0], path)
        # By real path, so that a cycle through a symbolic link is found as well.
        chain.append(os.path.realpath(path))
        base = data.pop(KEY, None)
        layers.append((path, data))
        # `extends:` with nothing below it reads as None and means no base.
        if base is None:
            return layers
        if not isinstance(base, str) or not base:
            raise RecipeError.at(
                KEY, base, f"not a path, in {path}", fix="Name one YAML file, from this file on"
            )
        # From this file's directory, as sources do: a recipe and its base move together.
        base_path = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if os.path.realpath(base_path) in chain:
            cycle = " -> ".join([*(name for name, _ in layers), base_path])
            raise RecipeError.at(
                KEY, base, f"a recipe cannot extend itself: {cycle}", fix="Break the cycle"
            )
        path = base_path


def merge_layers(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the data of a recipe: its bases, the last first, each laid over by the one before.

    Args:
        layers: As `read_layers` returns them.

    Raises:
        RecipeError: If a list of names selects entries that the base lacks.
    """
    *extending, (path, data) = layers
    merged = dict(data)
    # From the deepest base up, so that each file wins over all below it.
    for own_path, own in reversed(extending):
        # Before merging: afterward nobody knows which file a relative path came from.
        merged = _rebase(merged, os.path.dirname(path), os.path.dirname(own_path))
        merged = _merge(merged, own, FieldSpec(Recipe), "")
        path = own_path
    return merged


def name_origin(message: str, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return an error message with the base file that its field comes from, if it is inherited."""
    keys = message.split(" = ")[0].split(".")
    for at, (path, data) in enumerate(layers):
        # The first file that has the key wins in the merge, so it is the one to name.
        if _holds(data, keys):
            return f"{message} Inherited from {path}." if at else message
    return message


def _read_base(from_path: str, path: str) -> dict[str, Any]:
    try:
        return read_mapping(path)
    except RecipeError as error:
        named = (f"{message} {from_path} extends it." for message in error.problems)
        # `from None`: the first error's traceback would show the same message again.
        raise RecipeError(*named) from None


def _holds(node: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            return False
        node = node[key]
    return True


def _merge(base: Any, own: Any, spec: FieldSpec, path: str) -> Any:
    """Return `own` laid over `base`, both of which may stand at `spec`."""
    if isinstance(base, list) and isinstance(own, list) and _is_named_list(spec):
        return _merge_named(base, own, spec, path)
    if not (isinstance(base, dict) and isinstance(own, dict) and _has_fields(spec)):
        return own
    # A byte tokenizer over a trained one: fields of both kinds together would be an error.
    if _kind_without_key(base, spec) != _kind_without_key(own, spec):
        return own
    merged = dict(base)
    key = spec.discriminator
    if key is not None and key in own and own[key] != base.get(key):
        drop_fields(merged, spec, own[key])
    # The kind may be given by either file.
    below = union_member(spec, {**merged, **own})
    for name, value in own.items():
        child = below.child(name) or FieldSpec(Any)
        here = f"{path}.{name}" if path else str(name)
        merged[name] = _merge(merged[name], value, child, here) if name in merged else value
    return merged


def _has_fields(spec: FieldSpec) -> bool:
    """Return whether a mapping at `spec` holds fields, not values by domain that belong together.

    Shares sum to 1, so a share of the base among those of the extending file would be an error.
    `model.config` (values of any type) holds fields of transformers.
    """
    if any(member.model is not None for member in spec.members()) or spec.annotation is Any:
        return True
    mappings = [get_args(m.annotation) for m in spec.members() if get_origin(m.annotation) is dict]
    return any(value is Any for _, value in mappings)


def _kind_without_key(value: Mapping[str, Any], spec: FieldSpec) -> str | None:
    """Return the alternative of a union that is told by its fields (tokenizers), else None."""
    for item in spec.metadata:
        if isinstance(item, Discriminator) and callable(item.discriminator):
            return str(item.discriminator(value))
    return None


def _is_named_list(spec: FieldSpec) -> bool:
    item = spec.child(0) if get_origin(spec.annotation) is tuple else None
    return item is not None and item.model is not None and "name" in item.model.model_fields


def _merge_named(base: list[Any], own: list[Any], spec: FieldSpec, path: str) -> list[Any]:
    """Return two lists of mappings merged by `name`, or the entries of the base that are named."""
    by_name = {item["name"]: item for item in base if isinstance(item, dict) and "name" in item}
    if own and all(isinstance(item, str) for item in own):
        unknown = [name for name in own if name not in by_name]
        if unknown:
            raise RecipeError(
                *(
                    format_problem(
                        path,
                        name,
                        "the extended recipe has no entry of this name",
                        allowed=f"Known: {', '.join(map(str, by_name))}",
                        fix=did_you_mean(name, map(str, by_name)),
                    )
                    for name in unknown
                )
            )
        # In the order of the extending file: the order of domains is part of the corpus.
        return [by_name[name] for name in own]
    item_spot = spec.child(0) or FieldSpec(Any)
    merged = dict(by_name)
    unnamed: list[Any] = []
    for item in own:
        name = item.get("name") if isinstance(item, dict) else None
        if name is None:
            unnamed.append(item)  # kept, so that validation names the fault
        else:
            merged[name] = _merge(merged[name], item, item_spot, path) if name in merged else item
    return [*merged.values(), *unnamed]


def _rebase(data: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a recipe's data with relative paths that started at `old` starting at `new`."""
    # Relative, as written: jobs ship recipes to machines with other directories.
    prefix = os.path.relpath(old or ".", new or ".")
    if prefix == ".":
        return data
    return map_paths(data, lambda path, field, _: move(path, field, old, prefix))
