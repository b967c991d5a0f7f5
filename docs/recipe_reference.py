"""The page of all recipe fields, made from the models themselves: it cannot fall behind them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raymix.recipe import Recipe
from raymix.recipe.describe import FieldSpec, describe, tag_of

_INTRO = """# Recipes: every field

A recipe is one YAML file; every stage of a run follows from it. `raymix init my.yaml` writes one
with all fields and their comments, `raymix validate my.yaml` reports every fault at once, and
`raymix schema` prints the JSON schema for editors. Any field can be changed on the command line,
`train.steps=200`; a change of a kind (`mixer.kind=uniform`) drops the fields of the old kind.

**Paths.** A relative path in a file, of a source or of a result, starts at the directory of that
file: the same recipe means the same wherever it is run. One that is typed after the recipe
(`corpus.path=here`) starts at the working directory, as does one in a recipe without a file (a
mapping, or `module:function`). URLs and absolute paths are what they are.

This page is made from the models by `docs/recipe_reference.py`.
"""


def write_reference(path: Path) -> None:
    """Write the page to `path`, unless it says the same already."""
    text = reference()
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def reference() -> str:
    """Return the page as Markdown: a table of fields for each section, and each kind of one."""
    lines = [_INTRO, "## The recipe", "", *_table(Recipe)]
    for name, field in Recipe.model_fields.items():
        for title, model in _models(name, FieldSpec.of_field(field)):
            lines += ["", f"## {title}", "", _about(model), "", *_table(model)]
    return "\n".join(lines) + "\n"


def _models(path: str, spot: FieldSpec) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the models that may stand at a path, and below it, with what to call them."""
    members = [member for member in spot.members() if member.model is not None]
    for member in members:
        if member.model is None:
            continue
        kind = ""
        if len(members) > 1:
            # Told apart by a tag, or by the field that only one of them has.
            own = f"with {next(iter(member.model.model_fields))}"
            told = f"{spot.discriminator}: {tag_of(member, spot)}" if spot.discriminator else own
            kind = f", {told}"
        yield f"`{path}`{kind}", member.model
        for name, field in member.model.model_fields.items():
            yield from _models(f"{path}.{name}", FieldSpec.of_field(field))
    item = spot.child(0) if not members else None
    if item is not None and item.model is not None:
        yield from _models(f"{path}[i]", item)


def _about(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").replace("|", "\\|")


def _table(model: type[BaseModel]) -> list[str]:
    rows = [
        f"| `{name}` | {_cell(describe(FieldSpec.of_field(field)))} | {_default(field)} "
        f"| {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
    ]
    return ["| field | what it may be | default | meaning |", "|---|---|---|---|", *rows]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
