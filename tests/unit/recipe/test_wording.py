"""What the recipe says about itself: what may stand where, in words, for every field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from raymix.recipe import Recipe
from raymix.recipe.base import FieldDescription, Integer, Number
from raymix.recipe.describe import FieldSpec, describe, field_paths, listed, number, tag_of


def words(annotation: Any) -> str:
    return describe(FieldSpec(annotation).unwrapped())


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "a whole number"),
        (Annotated[Integer, Field(ge=1)], "a whole number of at least 1"),
        (Annotated[Integer, Field(ge=1, le=9)], "a whole number from 1 to 9"),
        (Annotated[Number, Field(gt=0, lt=1)], "a number above 0 and below 1"),
        (Annotated[Number, Field(gt=0, le=1)], "a number above 0 and at most 1"),
        (Annotated[Integer, Field(ge=0, lt=2**63)], "a whole number of at least 0 and below 2**63"),
        (bool, "true or false"),
        (str, "text"),
        (str | None, "text, or null"),
        (Any, "anything"),
        (Literal["a"], "'a'"),
        (Literal["a", "b", "c"], "'a', 'b' or 'c'"),
        (Literal[0, 1, "auto"], "0, 1 or 'auto'"),
        (
            Annotated[Integer, Field(ge=1)] | Literal["auto"],
            "a whole number of at least 1 or 'auto'",
        ),
        (tuple[str, ...], "a list of texts"),
        (tuple[float, float], "a list of 2: a number, a number"),
        (dict[str, Annotated[Number, Field(gt=0)]], "a mapping of names to numbers above 0"),
        (Annotated[str, FieldDescription("a glob")], "a glob"),
        (Recipe, "a mapping"),
        (tuple[Recipe, ...], "a list of mappings"),
    ],
)
def test_types_in_words(annotation: Any, expected: str) -> None:
    assert words(annotation) == expected


def every_spot(spot: FieldSpec, path: str = "") -> list[tuple[str, FieldSpec]]:
    spots = []
    for model in (member.model for member in spot.members()):
        for name, field in model.model_fields.items() if model else ():
            below = FieldSpec.of_field(field)
            spots += [(f"{path}{name}", below), *every_spot(below, f"{path}{name}.")]
    return spots


def test_every_field_can_be_described_without_python() -> None:
    for path, spot in every_spot(FieldSpec(Recipe)):
        said = describe(spot)
        assert said, path
        for internal in ("<", "typing", "class ", "Annotated", "NoneType", "Literal"):
            assert internal not in said, path


def test_every_member_of_a_union_of_models_has_its_tag() -> None:
    unions = {
        path: spot
        for path, spot in every_spot(FieldSpec(Recipe))
        if spot.tagged and "." not in path
    }
    tags = {path: [tag_of(m, spot) for m in spot.members()] for path, spot in unions.items()}
    assert tags == {
        "data": ["packed", "documents"],
        "mixer": [
            "static", "uniform", "proportional", "temperature", "epochs", "unimax", "importance",
            "schedule", "replay", "inherit",
            "pike", "dga", "doge", "doremi", "odm", "ado", "rb", "aioli",
        ],
        "model": ["config", "pretrained"],
    }  # fmt: skip


def test_paths_of_fields() -> None:
    paths = field_paths(FieldSpec(Recipe))
    assert {"train.steps", "corpus.tokenizer.vocab_size", "mixer.weights"} <= set(paths)
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1_000_000, "1,000,000"), (0.5, "0.5"), (1e-6, "1e-06"), (2**63, "2**63"),
     (10**18, "1e+18")],
)  # fmt: skip
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_lists_of_words() -> None:
    assert listed([], "or") == ""
    assert listed(["a"], "or") == "a"
    assert listed(["a", "b"], "or") == "a or b"
    assert listed(["a", "b", "c"], "and") == "a, b and c"
