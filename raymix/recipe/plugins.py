"""Mixer kinds of other packages in recipes.

The union of our own kinds is closed, so a misspelled kind is one clear error. `OpenUnion` adds the
kinds of a registry, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from raymix.recipe.base import RecipeModel


@dataclass(slots=True)
class Registry:
    """Factories by kind: ours, those a program registered, and those of entry points."""

    group: str
    """The entry-point group."""
    factories: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Factories imported so far."""
    models: dict[str, type[RecipeModel]] = field(default_factory=dict)
    """Models of the recipe's section, of kinds that declare one."""

    def entry_points(self, kind: str | None = None) -> EntryPoints:
        """Return the installed packages' entry points, of one kind or of all."""
        # Names only. Importing a package's mixer happens when a recipe uses it.
        points = entry_points(group=self.group)
        return points if kind is None else points.select(name=kind)

    def kinds(self) -> tuple[str, ...]:
        """Return all kinds, sorted."""
        return tuple(sorted({*self.factories, *self.entry_points().names}))


MIXERS = Registry("raymix.mixers")


@dataclass(frozen=True, slots=True)
class OpenUnion:
    """Metadata of a union of models told apart by `kind`: a registry's kinds are welcome too."""

    registry: Registry
    model: type[RecipeModel]
    own: frozenset[str]
    """The union's own kinds."""

    def others(self) -> tuple[str, ...]:
        """Return the kinds of other packages, sorted."""
        return tuple(kind for kind in self.registry.kinds() if kind not in self.own)

    def knows(self, kind: object) -> bool:
        """Return whether `kind` is of another package."""
        return isinstance(kind, str) and kind not in self.own and kind in self.registry.kinds()

    def _validate(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, self.model):
            return value
        if isinstance(value, dict) and self.knows(value.get("kind")):
            # Not through the union, whose discriminator refuses unknown kinds.
            return self.model.model_validate(value)
        return handler(value)

    def _serialize(
        self, value: Any, handler: Callable[[Any], Any], info: core_schema.SerializationInfo
    ) -> Any:
        if isinstance(value, self.model):
            return value.model_dump(mode=info.mode)
        return handler(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        inner = handler(source)
        return core_schema.no_info_wrap_validator_function(
            self._validate,
            inner,
            serialization=core_schema.wrap_serializer_function_ser_schema(
                self._serialize, info_arg=True, schema=inner
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        own = handler(schema)
        others = self.others()
        # Without plug-ins the schema stays the one in the documentation.
        if not others:
            return own
        # The package's own keys are unknown here, so editors check the kind alone.
        kinds = {"type": "object", "properties": {"kind": {"enum": list(others)}}}
        return {"anyOf": [own, {**kinds, "required": ["kind"]}]}


class PluginMixer(RecipeModel):
    """A mixer of another package, which checks the keys itself."""

    # The keys belong to the package; its own model checks them.
    model_config = ConfigDict(extra="allow")

    kind: str
    """The name under which the package registered it."""
    targets: tuple[str, ...] = ()
    """Domains that are measured and never trained on."""
