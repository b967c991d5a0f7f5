"""Documents that a JSON schema describes, as hypothesis draws them.

Of the schema language as much as ours uses; packages that know it all do not run with a current
hypothesis.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
Drawn = st.SearchStrategy[Any]

_WORDS = st.sampled_from(["a", "books", "data/*.txt", "corpora/x", "runs/{name}", "10", "auto"])
_MOST = 3


def documents(schema: Schema) -> Drawn:
    """Return what draws documents that `schema` describes, defaults left out as often as given."""
    return _Drawing(schema.get("$defs", {})).of(schema)


class _Drawing:
    def __init__(self, definitions: dict[str, Schema]) -> None:
        self._definitions = definitions
        self._known: dict[str, Drawn] = {}

    def of(self, schema: Schema) -> Drawn:
        if "$ref" in schema:
            return self._named(schema["$ref"].rpartition("/")[2])
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return st.one_of([self.of(one) for one in schema[several]])
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        return getattr(self, f"_{schema.get('type', 'any')}")(schema)

    def _named(self, name: str) -> Drawn:
        if name not in self._known:
            self._known[name] = st.deferred(lambda: self.of(self._definitions[name]))
        return self._known[name]

    def _object(self, schema: Schema) -> Drawn:
        properties = {name: self.of(one) for name, one in schema.get("properties", {}).items()}
        required = {name: properties.pop(name) for name in schema.get("required", ())}
        if required or properties:
            return st.fixed_dictionaries(required, optional=properties)
        values = schema.get("additionalProperties")
        inner = self.of(values) if isinstance(values, dict) else self._any({})
        return st.dictionaries(_WORDS, inner, max_size=_MOST)

    def _array(self, schema: Schema) -> Drawn:
        if "prefixItems" in schema:
            return st.tuples(*(self.of(one) for one in schema["prefixItems"])).map(list)
        least = schema.get("minItems", 0)
        inner = self.of(schema.get("items", {}))
        return st.lists(inner, min_size=least, max_size=least + _MOST)

    def _string(self, schema: Schema) -> Drawn:
        if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        least = schema.get("minLength", 0)
        return _WORDS | st.text(min_size=least, max_size=max(least, 8))

    def _integer(self, schema: Schema) -> Drawn:
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        near = st.integers(low or 0, min((low or 0) + 20, high or 2**63))
        return near | st.integers(low, high)

    def _number(self, schema: Schema) -> Drawn:
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        return st.floats(
            low,
            high,
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
            allow_nan=False,
            allow_infinity=False,
        )

    def _boolean(self, schema: Schema) -> Drawn:
        return st.booleans()

    def _null(self, schema: Schema) -> Drawn:
        return st.none()

    def _any(self, schema: Schema) -> Drawn:
        return st.none() | st.booleans() | st.integers() | _WORDS
