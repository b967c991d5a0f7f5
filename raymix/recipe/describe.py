"""Descriptions of recipe fields: which model stands at a dotted path, and what it accepts."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from raymix.recipe.base import FieldDescription


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """A field of the recipe: its type and its metadata (bounds, description)."""

    annotation: Any
    metadata: tuple[Any, ...] = ()
    discriminator: str | None = None

    @classmethod
    def of_field(cls, field: FieldInfo) -> FieldSpec:
        """Return the specification of a model's field."""
        tag = field.discriminator if isinstance(field.discriminator, str) else None
        return cls(field.annotation, tuple(field.metadata), tag).unwrapped()

    def unwrapped(self) -> FieldSpec:
        """Return the specification without `Annotated` around it, with its metadata."""
        if get_origin(self.annotation) is not Annotated:
            return self
        # Annotated can be nested; pydantic flattens it only for a field's own type.
        inner, *extra = get_args(self.annotation)
        tags = [m.discriminator for m in extra if isinstance(m, FieldInfo) and m.discriminator]
        named = next((tag for tag in tags if isinstance(tag, str)), self.discriminator)
        return FieldSpec(inner, (*self.metadata, *_flat(extra)), named).unwrapped()

    def members(self) -> list[FieldSpec]:
        """Return the alternatives of a union (None left out); of anything else, itself."""
        if get_origin(self.annotation) not in (Union, types.UnionType):
            return [self]
        parts = [part for part in get_args(self.annotation) if part is not type(None)]
        # A description of the union as a whole would be wrong for one of its members.
        inherited = tuple(m for m in self.metadata if not isinstance(m, FieldDescription))
        return [FieldSpec(part, inherited).unwrapped() for part in parts]

    @property
    def optional(self) -> bool:
        """Whether null is accepted."""
        return type(None) in get_args(self.annotation)

    @property
    def tagged(self) -> bool:
        """Whether a discriminator selects the alternative."""
        return self.discriminator is not None or any(
            isinstance(m, Discriminator) for m in self.metadata
        )

    @property
    def model(self) -> type[BaseModel] | None:
        """The recipe model of this field, if it is exactly one."""
        return self.annotation if _is_model(self.annotation) else None

    def child(self, key: str | int) -> FieldSpec | None:
        """Return the specification below `key`; None where the recipe has no such field."""
        if self.model is not None:
            field = self.model.model_fields.get(str(key))
            return None if field is None else FieldSpec.of_field(field)
        origin, args = get_origin(self.annotation), get_args(self.annotation)
        if origin is tuple and isinstance(key, int):
            # tuple[X, ...] is a list of any length; tuple[X, Y] has a type per place.
            if len(args) == 2 and args[1] is Ellipsis:
                return FieldSpec(args[0]).unwrapped()
            return FieldSpec(args[key]).unwrapped() if key < len(args) else None
        return FieldSpec(args[1]).unwrapped() if origin is dict else None


def tag_of(spec: FieldSpec, union: FieldSpec) -> str:
    """Return the tag by which a tagged union knows one of its members."""
    explicit = next((m.tag for m in spec.metadata if isinstance(m, Tag)), None)
    if explicit is not None or spec.model is None or union.discriminator is None:
        return explicit or ""
    return str(get_args(spec.model.model_fields[union.discriminator].annotation)[0])


def field_paths(spec: FieldSpec, path: str = "") -> list[str]:
    """Return the dotted paths of all fields below `spec`, sections first; lists are left out."""
    paths: list[str] = []
    for model in (member.model for member in spec.members()):
        for name, field in model.model_fields.items() if model else ():
            below = f"{path}.{name}" if path else name
            # The section itself is a target of suggestions too: `corpus.tokenizr`.
            paths += [below, *field_paths(FieldSpec.of_field(field), below)]
    # Members of a union share fields; each path is listed once, in order.
    return list(dict.fromkeys(paths))


def describe(spec: FieldSpec) -> str:
    """Return what `spec` accepts, such as `a whole number of at least 1, or null`."""
    words = next((m.text for m in spec.metadata if isinstance(m, FieldDescription)), None)
    if words is None and spec.discriminator is not None:
        tags = [tag_of(member, spec) for member in spec.members()]
        words = f"a mapping whose {spec.discriminator} is {listed(tags, 'or')}"
    elif words is None:
        words = _alternatives(spec.members())
    return f"{words}, or null" if spec.optional else words


def _alternatives(members: Sequence[FieldSpec]) -> str:
    return " or ".join(dict.fromkeys(_describe_one(member) for member in members))


def _describe_one(spec: FieldSpec) -> str:
    annotation, origin, args = (
        spec.annotation,
        get_origin(spec.annotation),
        get_args(spec.annotation),
    )
    words = next((m.text for m in spec.metadata if isinstance(m, FieldDescription)), None)
    if words is not None:
        return words
    if origin is Literal:
        return listed([repr(arg) for arg in args], "or")
    if origin is dict:
        return f"a mapping of names to {_plural(describe(FieldSpec(args[1]).unwrapped()))}"
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)}: " + ", ".join(
            describe(FieldSpec(a).unwrapped()) for a in args
        )
    if origin is tuple:
        return f"a list of {_plural(describe(FieldSpec(args[0]).unwrapped()))}"
    if _is_model(annotation):
        return "a mapping"
    nouns = {bool: "true or false", str: "text", Any: "anything"}
    if annotation in nouns:
        return nouns[annotation]
    noun = "a whole number" if annotation is int else "a number"
    return " ".join([noun, _bounds(spec.metadata)]).strip()


def _plural(noun: str) -> str:
    # A list `of texts`, `of whole numbers`, `of mappings`.
    return "texts" if noun == "text" else re.sub(r"^a ((?:whole )?number|mapping)", r"\1s", noun)


def _bounds(metadata: Iterable[Any]) -> str:
    # One bound per kind: pydantic itself applies the last of several.
    bounds = {type(bound): bound for bound in _flat(metadata)}
    low, high = bounds.get(at.Ge), bounds.get(at.Le)
    if low and high:
        return f"from {number(low.ge)} to {number(high.le)}"
    words = [
        *([f"of at least {number(low.ge)}"] if low else []),
        *([f"above {number(bounds[at.Gt].gt)}"] if at.Gt in bounds else []),
        *([f"at most {number(high.le)}"] if high else []),
        *([f"below {number(bounds[at.Lt].lt)}"] if at.Lt in bounds else []),
    ]
    return " and ".join(words)


def number(value: Any) -> str:
    """Return a number as a person writes it: 1,000,000, 0.5, 1e+18, 2**63."""
    # Beyond 2**53 a float is no longer exact, and digits say less than a power.
    if isinstance(value, int) and value >= 2**53:
        exact = value & (value - 1) == 0
        return f"2**{value.bit_length() - 1}" if exact else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def listed(words: Sequence[str], last: str) -> str:
    """Return `a, b or c`."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + f" {last} {words[-1]}"


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _flat(metadata: Iterable[Any]) -> tuple[Any, ...]:
    """Return the metadata with that of nested `Field(...)`s laid out flat."""
    # pydantic keeps the bounds of a nested Field inside its FieldInfo.
    flat: list[Any] = []
    for item in metadata:
        flat.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return tuple(flat)
