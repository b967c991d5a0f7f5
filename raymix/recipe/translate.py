"""Pydantic's errors as our messages: one per fault, at the path that the user wrote."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from raymix.errors import did_you_mean, format_problem, join_sentences
from raymix.recipe.base import Fault, Faults
from raymix.recipe.describe import FieldSpec, describe, field_paths, tag_of
from raymix.recipe.plugins import OpenUnion

_Path = tuple[str | int, ...]


class _Missing:
    """Stands for the value of a missing key."""

    def __repr__(self) -> str:
        return "(missing)"


MISSING = _Missing()

_WRONG = {
    "missing": "required",
    "bool_parsing": "not true or false",
    "bool_type": "not true or false",
    "dict_type": "not a mapping",
    "finite_number": "not a finite number",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "int_from_float": "not a whole number",
    "int_parsing": "not a whole number",
    "int_parsing_size": "too large",
    "int_type": "not a whole number",
    "less_than": "too large",
    "less_than_equal": "too large",
    "model_attributes_type": "not a mapping",
    "model_type": "not a mapping",
    "string_pattern_mismatch": "not a valid name",
    "string_too_long": "too long",
    "string_too_short": "empty",
    "string_type": "not text",
    "string_unicode": "not valid text",
    "tuple_type": "not a list",
    "union_tag_not_found": "required",
}
# A union reports an error of every alternative; these say most about what the user meant.
_INFORMATIVE = ("value_error", "greater_than", "greater_than_equal", "less_than", "less_than_equal")


@dataclass(frozen=True, slots=True)
class _ErrorLocation:
    """A pydantic error, its path as written in the recipe, and the field's specification."""

    path: _Path
    spec: FieldSpec
    parent: FieldSpec
    branch: _Path | None
    error: ErrorDetails


def translate(errors: Iterable[ErrorDetails], root: type[BaseModel]) -> list[str]:
    """Return one message per fault, in the order of the fields of `root`.

    Args:
        errors: What `ValidationError.errors()` gave for a validation of `root`.
        root: The model that was validated.
    """
    located = [_locate(error, FieldSpec(root)) for error in errors]
    return [
        message for item in _one_per_place(located) for message in _message(item, FieldSpec(root))
    ]


def fault_message(fault: Fault, prefix: _Path = ()) -> str:
    """Return the message of a rule's fault; `prefix` is the path of the model that states it."""
    path = ".".join([dotted(prefix)] * bool(prefix) + [fault.field] * bool(fault.field))
    advice = join_sentences(*fault.advice)
    return format_problem(path, brief(fault.value), fault.wrong, fix=advice)


def dotted(path: Iterable[str | int]) -> str:
    """Return a path as it is written in overrides; a key that is no plain name is quoted."""
    return ".".join(str(key) if re.fullmatch(r"[\w.-]+", str(key)) else repr(key) for key in path)


def brief(value: object, limit: int = 100) -> object:
    """Return `value`, or something whose repr is a short form of a long one."""
    text = repr(value)
    return value if len(text) <= limit else _Short(text[: limit - 3] + "...")


@dataclass(frozen=True, slots=True, repr=False)
class _Short:
    text: str

    def __repr__(self) -> str:
        return self.text


def _locate(error: ErrorDetails, spec: FieldSpec) -> _ErrorLocation:
    """Walk the error's location along the models; pydantic puts tags of unions into it."""
    path: list[str | int] = []
    parent = spec
    branch: _Path | None = None
    # pydantic's location holds union tags between the keys; the user's path has only keys.
    keys = list(error["loc"])
    while keys:
        members = spec.members()
        if len(members) > 1:
            tag = str(keys.pop(0))
            # An untagged union reports every alternative; remember where, to keep one of them.
            if not spec.tagged:
                branch = tuple(path)
            if not keys:
                break
            if spec.tagged:
                spec = next((m for m in members if tag_of(m, spec) == tag), members[0])
            else:
                spec = next((m for m in members if m.child(keys[0]) is not None), members[0])
            continue
        key = keys.pop(0)
        path.append(key)
        parent, spec = members[0], members[0].child(key) or FieldSpec(Any)
    return _ErrorLocation(tuple(path), spec, parent, branch, error)


def _one_per_place(located: Sequence[_ErrorLocation]) -> list[_ErrorLocation]:
    """Keep one error per value where an untagged union reported every alternative."""
    selected: list[_ErrorLocation] = []
    for item in located:
        if item.branch is None:
            # A list whose entries are at fault counts as too short: that says nothing new.
            inner = any(_is_below(other.path, item.path) for other in located)
            selected.extend([] if inner and item.error["type"] == "too_short" else [item])
            continue
        rivals = [other for other in located if other.branch == item.branch]
        # An error inside an alternative means that alternative was meant.
        deeper = [other for other in rivals if other.path != item.branch]
        if deeper:
            selected.extend([item] if item in deeper else [])
        elif item is min(rivals, key=lambda other: _rank(other.error["type"])):
            selected.append(item)
    return selected


def _is_below(path: _Path, above: _Path) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _rank(kind: str) -> int:
    return _INFORMATIVE.index(kind) if kind in _INFORMATIVE else len(_INFORMATIVE)


def _message(item: _ErrorLocation, root: FieldSpec) -> list[str]:
    error, kind, value = item.error, item.error["type"], item.error["input"]
    name = dotted(item.path)
    # The commonest mistake, a misspelled field, gets suggestions from the whole recipe.
    if kind == "extra_forbidden":
        return [_unknown_key(item, name, root)]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return [_unknown_kind(item, name)]
    raised = error.get("ctx", {}).get("error")
    if isinstance(raised, Faults):
        allowed = (f"Allowed: {describe(item.spec)}",)
        faults = (f if f.field or f.advice else replace(f, advice=allowed) for f in raised.faults)
        return [fault_message(fault, item.path) for fault in faults]
    if kind == "missing":
        return [_missing(item, name)]
    # pydantic reports inf and NaN as type errors; the user needs to know which number it was.
    if isinstance(value, float) and not math.isfinite(value):
        kind = "finite_number"
    wrong = _WRONG.get(kind) or _wrong_of_choice(kind, item, error)
    near = _near_choice(item.spec, value)
    return [
        format_problem(
            name, brief(value), wrong, allowed=f"Allowed: {describe(item.spec)}", fix=near
        )
    ]


def _wrong_of_choice(kind: str, item: _ErrorLocation, error: ErrorDetails) -> str:
    if kind == "literal_error":
        return "not known"
    if kind in ("too_short", "too_long"):
        actual = error.get("ctx", {}).get("actual_length")
        return f"has {actual} entries" if actual else "empty"
    return error["msg"]


def _near_choice(spec: FieldSpec, value: object) -> str:
    choices = [
        str(arg)
        for member in spec.members()
        for arg in get_args(member.annotation)
        if isinstance(arg, str)
    ]
    return did_you_mean(value, choices) if isinstance(value, str) else ""


def _unknown_key(item: _ErrorLocation, name: str, root: FieldSpec) -> str:
    key = str(item.path[-1])
    model = item.parent.model
    known = list(model.model_fields) if model else []
    section = "".join(f"{part}." for part in item.path[:-1])
    near = did_you_mean(name, [section + field for field in known]) or _elsewhere(key, root)
    return format_problem(
        name,
        brief(item.error["input"]),
        "unknown key",
        allowed=near,
        fix=f"Known: {', '.join(known)}",
    )


def _elsewhere(key: str, root: FieldSpec) -> str:
    """Return `Did you mean 'train.steps'?` for a field of another section."""
    # Reversed, so that of fields with one name the first of the recipe remains.
    paths = {path.rpartition(".")[2]: path for path in reversed(field_paths(root))}
    # Stricter than within a section: there are hundreds of fields elsewhere.
    near = difflib.get_close_matches(key, list(paths), n=1, cutoff=0.8)
    return f"Did you mean {paths[near[0]]!r}?" if near else ""


def _unknown_kind(item: _ErrorLocation, name: str) -> str:
    context = item.error.get("ctx", {})
    key = str(context.get("discriminator", "kind")).strip("'")
    known = [tag_of(member, item.spec) for member in item.spec.members()]
    known += [kind for m in item.spec.metadata if isinstance(m, OpenUnion) for kind in m.others()]
    # pydantic points at the section; the user has to change its tag.
    name = f"{name}.{key}"
    if item.error["type"] == "union_tag_not_found":
        return format_problem(name, MISSING, "required", allowed=f"Known: {', '.join(known)}")
    tag = item.error["input"][key]
    near = did_you_mean(tag, known) if isinstance(tag, str) else ""
    return format_problem(
        name, brief(tag), "not known", allowed=near, fix=f"Known: {', '.join(known)}"
    )


def _missing(item: _ErrorLocation, name: str) -> str:
    field = item.parent.model.model_fields[str(item.path[-1])] if item.parent.model else None
    meaning = field.description if field is not None and field.description else ""
    return format_problem(
        name, MISSING, "required", allowed=f"Give {describe(item.spec)}", fix=meaning
    )


def known_names(names: Sequence[str], limit: int = 20) -> str:
    """Return the names for a message, the first `limit` of them when there are many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
