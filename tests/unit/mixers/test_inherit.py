"""Shares of a run whose domains change."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymix.errors import RecipeError
from raymix.mixers import inherited_shares
from raymix.recipe import InheritMixer

BEFORE = {"web": 0.5, "books": 0.3, "code": 0.2}


def shares(tokens: dict[str, int], **options: Any) -> dict[str, float]:
    return inherited_shares(InheritMixer(kind="inherit", **options), BEFORE, tokens)


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        ({"web": 9, "books": 9, "code": 9}, {}, BEFORE),
        (
            {"web": 9, "books": 9, "code": 9, "math": 9}, {"added": {"math": 0.2}},
            {"web": 0.4, "books": 0.24, "code": 0.16, "math": 0.2},
        ),
        ({"web": 9, "code": 9}, {}, {"web": 5 / 7, "code": 2 / 7}),
        (
            {"news": 10, "blogs": 30, "books": 9, "code": 9},
            {"split": {"web": ["news", "blogs"]}},
            {"news": 0.125, "blogs": 0.375, "books": 0.3, "code": 0.2},
        ),
        (
            {"news": 10, "blogs": 30, "books": 9, "math": 5},
            {"split": {"web": ["news", "blogs"]}, "added": {"math": 0.2}},
            {"news": 0.125, "blogs": 0.375, "books": 0.3, "math": 0.2},
        ),
    ],
    ids=["none", "added", "removed", "split", "all"],
)  # fmt: skip
def test_examples(
    tokens: dict[str, int], options: dict[str, Any], expected: dict[str, float]
) -> None:
    result = shares(tokens, **options)
    assert list(result) == list(tokens)
    assert result == pytest.approx(expected)


@given(
    before=st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1), min_size=2),
    added=st.dictionaries(st.sampled_from("wxyz"), st.floats(0, 0.2)),
    kept=st.integers(1, 4),
)
def test_what_stays_keeps_its_proportions_and_all_sum_to_one(
    before: dict[str, float], added: dict[str, float], kept: int
) -> None:
    names = [*list(before)[:kept], *added]
    config = InheritMixer(kind="inherit", added=added)
    result = inherited_shares(config, before, dict.fromkeys(names, 100))
    assert sum(result.values()) == pytest.approx(1)
    assert {name: result[name] for name in added} == added
    for one, other in permutations(list(before)[:kept], 2):
        assert result[one] * before[other] == pytest.approx(result[other] * before[one])


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"added": {"x": 0.5, "y": 0.5}}, "the shares sum to 1"),
        ({"added": {"x": 0.1}, "split": {"a": ["x"]}}, "x would have two shares"),
        ({"split": {"a": ["x"], "b": "x"}}, "x would have two shares"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        InheritMixer(kind="inherit", **options)


def test_nothing_that_stays_is_refused() -> None:
    with pytest.raises(RecipeError, match="no domain with a share stays"):
        shares({"x": 9}, added={"x": 0.5})
