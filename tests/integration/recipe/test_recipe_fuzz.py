"""Whatever a recipe file holds: it loads, or it is refused in the house form."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymix.errors import RecipeError
from raymix.recipe import Recipe, load_recipe, recipe_schema
from tests.support.recipes import DOCUMENT
from tests.support.schemas import documents

FORM = re.compile(r"[^\n]+ = .+: .+[.?!]", re.DOTALL)
TEXT = yaml.safe_dump(DOCUMENT, sort_keys=False)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["static", "auto", "packed", "bpe", "10", "nan", "a.b", "{name}", "~", ""]),
)
KEYS = st.sampled_from(
    ["name", "steps", "kind", "weights", "train", "path", "vocab_size", "mode", "pieces", "typo"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything in a document."""
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    return [path] * bool(path) + [p for key, item in items for p in places(item, (*path, key))]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    for _ in range(draw(st.integers(1, 4))):
        paths = places(document)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        node: Any = document
        for key in parents:
            node = node[key]
        match draw(st.sampled_from(["replace", "delete", "rename", "add"])):
            case "replace":
                node[last] = draw(VALUES)
            case "delete":
                del node[last]
            case "rename" if isinstance(node, dict):
                node[draw(KEYS)] = node.pop(last)
            case _ if isinstance(node, dict):
                node[draw(KEYS)] = draw(VALUES)
    return document


def check(file: Path, *overrides: str) -> None:
    problems: tuple[str, ...] = ()
    try:
        assert isinstance(load_recipe(file, overrides), Recipe)
    except RecipeError as error:
        problems = error.problems or ("an error without a message",)
    for message in problems:
        assert FORM.fullmatch(message), message
        assert "pydantic" not in message


@pytest.fixture(scope="module")
def file() -> Path:
    return Path(tempfile.mkdtemp()) / "fuzz.yaml"


@settings(max_examples=120)
@given(document=mutated())
def test_changed_documents(file: Path, document: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")
    check(file)


SCHEMA = documents(recipe_schema())


def check_document(file: Path, document: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")
    check(file)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(document=SCHEMA)
def test_documents_of_the_schema(file: Path, document: dict[str, Any]) -> None:
    check_document(file, document)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=5000, suppress_health_check=list(HealthCheck))
@given(document=SCHEMA | mutated())
def test_many_documents(file: Path, document: dict[str, Any]) -> None:
    check_document(file, document)


@settings(max_examples=120)
@given(
    at=st.integers(0, len(TEXT)),
    remove=st.integers(0, 12),
    insert=st.text(
        st.sampled_from(list(" \n\t:-{}[]&*!|>'\"%@#,=~.0aé\x00\x07\u2028")), max_size=8
    ),
)
def test_changed_text(file: Path, at: int, remove: int, insert: str) -> None:
    file.write_bytes((TEXT[:at] + insert + TEXT[at + remove :]).encode())
    check(file)


@settings(max_examples=100)
@given(raw=st.binary(max_size=60))
def test_any_bytes(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    check(file)


@settings(max_examples=120)
@given(
    path=st.lists(
        st.sampled_from(
            [*DOCUMENT, "domains", "0", "1", "9", "train", "weights", "kind", "tokenizer", "", "x"]
        ),
        max_size=4,
    ).map(".".join),
    value=st.text(max_size=12) | VALUES.map(str),
)
def test_any_override(file: Path, path: str, value: str) -> None:
    file.write_text(TEXT, "utf-8")
    check(file, f"{path}={value}")
    check(file, path + value)
