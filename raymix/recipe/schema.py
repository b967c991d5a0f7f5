"""JSON schema of recipes, and a commented recipe generated from the same models."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raymix._utils.yaml import dump_yaml
from raymix.recipe.describe import FieldSpec, describe, tag_of
from raymix.recipe.document import Recipe

SCHEMA_FILE = "raymix.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
_WIDTH = 98


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe, with every field's description."""
    schema = Recipe.model_json_schema(mode="validation")
    # First, where editors look for it; dicts keep their order.
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "raymix recipe"}
    # A file that extends another may leave any section to it.
    required = schema.pop("required")
    schema["anyOf"] = [{"required": required}, {"required": ["extends"]}]
    return {**head, **{key: item for key, item in schema.items() if key != "title"}}


def commented_recipe(name: str) -> str:
    """Return a recipe as YAML with every field, its description, type and default.

    Args:
        name: The run's name; the files it names (`data/books/*.parquet`, ...) are placeholders.
    """
    example: dict[str, Any] = {
        "name": name,
        "corpus": {
            "path": f"corpora/{name}",
            "tokenizer": "byte",
            "domains": [
                {"name": "books", "train": "data/books/*.parquet"},
                {"name": "code", "train": "data/code/*.jsonl.gz"},
            ],
        },
        "mixer": {"kind": "proportional"},
        "model": {
            "kind": "config",
            "config": {
                "hidden_size": 256,
                "intermediate_size": 704,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
        },
        "train": {"steps": 1000},
    }
    intro = [
        EDITOR_LINE,
        "# A raymix recipe: one file for prepare, plan, train, eval and report.",
        "# Every field is shown with its default; delete what you do not change.",
        "# Relative paths start at this file, those on a command line where it is typed.",
    ]
    return "\n".join([*intro, *_model_lines(Recipe, example, "")]) + "\n"


def _model_lines(
    model: type[BaseModel], values: Mapping[str, Any], indent: str, kinds: FieldSpec | None = None
) -> Iterator[str]:
    """Yield the lines of a mapping: each field of `model` with its comment above it.

    Args:
        model: The model of the mapping.
        values: The fields that do not keep their defaults.
        indent: White space before every line.
        kinds: The union that `model` was chosen from, if it was.
    """
    for name, field in model.model_fields.items():
        spec = FieldSpec.of_field(field)
        value = values.get(name, _plain_default(field))
        inner = _member(spec, value)
        # A blank line between top-level sections only.
        if not indent:
            yield ""
        yield from _comment(field.description or "", indent)
        if inner is None:
            yield from _comment(f"  {_allowed(field, spec, kinds, name)}", indent, hang=2)
        if inner is not None:
            yield f"{indent}{name}:"
            yield from _kinds(spec, value, indent + "  ")
            yield from _model_lines(inner, value, indent + "  ", spec)
        elif name == "domains" and value:  # models; those of `specialists` are names, none given
            yield f"{indent}{name}:"
            yield from _domain_lines(spec, value, indent + "  ")
        else:
            yield f"{indent}{name}: {_flow(value)}"


def _domain_lines(spec: FieldSpec, domains: list[dict[str, Any]], indent: str) -> Iterator[str]:
    """Yield a list whose first entry is commented field by field, the others brief."""
    item = spec.child(0)
    assert item is not None, "domains is a list"
    assert item.model is not None, "domains is a list of models"
    lines = list(_model_lines(item.model, domains[0], indent + "  "))
    # YAML wants the dash on the first field, below the field's comment.
    entry = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    yield from lines[:entry]
    yield f"{indent}- {lines[entry].strip()}"
    yield from lines[entry + 1 :]
    for domain in domains[1:]:
        yield f"{indent}- {_flow(domain)}"


def _kinds(spec: FieldSpec, value: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Yield, where a section comes in kinds, what the other kinds are."""
    # One line per other kind: the file shows every field only of the chosen one.
    others = [m for m in spec.members() if m is not _chosen(spec, value)]
    for member in others:
        if member.model is None:
            continue
        key, tag = spec.discriminator or "kind", tag_of(member, spec)
        fields = [name for name in member.model.model_fields if name != key]
        known = _chosen(spec, value).model
        new = [name for name in fields if known is None or name not in known.model_fields]
        extra = f" Adds: {', '.join(new)}." if new else ""
        yield from _comment(f"{key}: {tag} - {_first_line(member.model)}{extra}", indent, hang=4)


def _chosen(spec: FieldSpec, value: Mapping[str, Any]) -> FieldSpec:
    members = spec.members()
    tag = value.get(spec.discriminator or "")
    return next((m for m in members if tag_of(m, spec) == tag), members[0])


def _member(spec: FieldSpec, value: Any) -> type[BaseModel] | None:
    """Return the model whose fields are written out at `spec`, or None for a plain value."""
    return _chosen(spec, value).model if isinstance(value, dict) else None


def _plain_default(field: FieldInfo) -> Any:
    # A factory may take the other fields; the defaults here need none.
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def _allowed(field: FieldInfo, spec: FieldSpec, kinds: FieldSpec | None, name: str) -> str:
    """Return what the comment above a field says of its type and default."""
    if kinds is not None and name == kinds.discriminator:
        return ", ".join(tag_of(member, kinds) for member in kinds.members())
    if field.is_required():
        return f"{describe(spec)}; required"
    return f"{describe(spec)}; default {_flow(_plain_default(field))}"


def _flow(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    # A bare scalar is dumped with an end-of-document marker.
    return dump_yaml(value).removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str, hang: int = 0) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=start + " " * hang,
        break_long_words=False,
        # A name or glob with a hyphen, broken there, reads as two words.
        break_on_hyphens=False,
    )


def _first_line(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").split("\n")[0]
