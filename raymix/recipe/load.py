"""Loading recipes from files and functions: extends, overrides, validation, paths.

`load_recipe` reports every fault at once. Where relative paths start is in `raymix.recipe.paths`. A
loaded recipe holds absolute paths and URLs only, so it means the same on every worker and in
`resolved.yaml`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from raymix._utils.hub import HUB, is_hub_name
from raymix._utils.imports import importing_from_here
from raymix._utils.yaml import dump_yaml
from raymix.errors import RecipeError, did_you_mean
from raymix.recipe.document import Recipe
from raymix.recipe.extends import merge_layers, name_origin, read_layers
from raymix.recipe.overrides import apply_overrides
from raymix.recipe.paths import (
    PathField,
    absolute,
    is_url,
    map_override,
    map_paths,
    move,
)
from raymix.recipe.rules import broken_rules
from raymix.recipe.translate import fault_message, translate

_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


RecipeSource = str | os.PathLike[str] | Recipe | Mapping[str, Any]
"""Sources that a recipe is loaded from; see `load_recipe`."""


def load_recipe(source: RecipeSource, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe at `source` with `overrides` applied and its paths made absolute.

    Args:
        source: A YAML file, `module:function` where the function returns a Recipe, a Recipe, or the
            data of one: relative paths in it start at the working directory.
        overrides: Changes such as `train.steps=200`, `corpus.domains.0.name=books` or
            `mixer.weights={a: 0.5, b: 0.5}`; values are YAML. Relative paths in them start at the
            working directory. A change of a kind (`mixer.kind=uniform`) drops the fields that only
            the old kind has.

    Raises:
        RecipeError: With one message per fault: of the file, the overrides, or the recipe.
    """
    recipe, base = read_recipe(source, overrides)
    return resolve_paths(recipe, base)


def read_recipe(source: RecipeSource, overrides: Sequence[str] = ()) -> tuple[Recipe, str]:
    """Return the recipe with its paths as they were written, and the directory they start at.

    Relative paths in overrides are rewritten to start there, too.

    Args:
        source: As for `load_recipe`.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: As `load_recipe` does.
    """
    if isinstance(source, Mapping):
        return _validate(apply_overrides(source, overrides)), os.getcwd()
    name = source if isinstance(source, Recipe) else os.fspath(source)
    # A file wins over `module:function`, as its name may hold a colon.
    if isinstance(name, str) and not (_FUNCTION.fullmatch(name) and not os.path.exists(name)):
        layers = read_layers(name)
        data = merge_layers(layers)
        directory, here = _directory(name), os.getcwd()
        prefix = os.path.relpath(here, directory)

        def typed_here(path: str, value: Any) -> Any:
            return map_override(path, value, lambda p, field, _: move(p, field, here, prefix))

        try:
            # Overrides go on the data, not on the model: they may change a kind, or supply a
            # missing field.
            return _validate(apply_overrides(data, overrides, change=typed_here)), directory
        except RecipeError as error:
            raise RecipeError(*(name_origin(text, layers) for text in error.problems)) from None
    recipe = name if isinstance(name, Recipe) else _call(name)
    if not overrides:
        return recipe, os.getcwd()
    # JSON mode gives lists for tuples, as a YAML file would.
    data = recipe.model_dump(mode="json")
    return _validate(apply_overrides(data, overrides)), os.getcwd()


def recipe_files(source: str | os.PathLike[str]) -> list[str]:
    """Return the files that a recipe is made of: itself, then those it extends, in order.

    Raises:
        RecipeError: If one of them cannot be read.
    """
    return [path for path, _ in read_layers(os.fspath(source))]


def _directory(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML that loads to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def resolve_paths(recipe: Recipe, base: str | os.PathLike[str]) -> Recipe:
    """Return the recipe with absolute paths; URLs (`s3://...`) stay as they are.

    Args:
        recipe: The recipe.
        base: Directory at which relative paths start.
    """
    start = os.path.abspath(base)
    return map_paths(recipe, lambda path, field, _: absolute(path, field, start))


def shadowed_names(recipe: Recipe, base: str | os.PathLike[str]) -> list[str]:
    """Return a line per path that could be a name of the Hub and is a directory or file here.

    Args:
        recipe: The recipe, its paths as they were written.
        base: Directory at which relative paths start.
    """
    lines: list[str] = []

    def look(path: str, field: PathField, at: str) -> str:
        if field.on_hub and path not in field.words and is_hub_name(path):
            location = absolute(path, field, os.path.abspath(base))
            if not is_url(location):
                lines.append(
                    f"{at}: {location} is used, not {path} of the Hub (that is {HUB}{path})"
                )
        return path

    map_paths(recipe, look)
    return lines


def _call(source: str) -> Recipe:
    """Return what the function named `module:function` returns."""
    module_name, function_name = source.split(":")
    with importing_from_here():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise RecipeError.at(
                "recipe",
                source,
                str(error),
                fix="Give a YAML file, or a module that Python finds from here",
            ) from error
        function = getattr(module, function_name, None)
        # vars(module) also lists what it imported; a near miss among those still helps.
        if not callable(function):
            known = [name for name, item in vars(module).items() if callable(item)]
            problem = f"module {module_name!r} has no function {function_name!r}"
            near = did_you_mean(function_name, known)
            raise RecipeError.at("recipe", source, problem, fix=near)
        recipe = function()
    if not isinstance(recipe, Recipe):
        raise RecipeError.at(
            "recipe",
            source,
            f"the function returned a {type(recipe).__name__}, not a raymix.Recipe",
        )
    return recipe


def _validate(data: Mapping[str, Any]) -> Recipe:
    """Return the recipe, or raise all faults: of fields, and of rules over sound sections."""
    optional = {name for name, field in Recipe.model_fields.items() if not field.is_required()}
    # `eval:` with nothing below it is None in YAML and means the defaults.
    data = {key: item for key, item in data.items() if item is not None or key not in optional}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        messages = translate(error.errors(include_url=False), Recipe)
    messages += [fault_message(fault) for fault in broken_rules(_sound_sections(data))]
    # A rule inside a section is reported by pydantic and by the check of sections; once is enough.
    raise RecipeError(*dict.fromkeys(messages))


def _sound_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the top-level sections that are valid on their own, defaults for absent ones."""
    sections: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name not in data:
            if not field.is_required():
                sections[name] = field.get_default(call_default_factory=True)
            continue
        # Its errors have been reported; the rules over the sections that are valid still apply.
        with suppress(ValidationError):
            tag = Field(discriminator=field.discriminator)
            kind: Any = field.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[kind, tag, *field.metadata])
            sections[name] = adapter.validate_python(data[name])
    return sections
