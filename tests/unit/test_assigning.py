"""Which workers may share documents: what the recipe says, and what it may not say."""

from __future__ import annotations

from typing import Any

import pytest

from raymix.recipe import DocumentData, Recipe
from raymix.recipe.training import PackedData
from raymix.train.assigning import context_of, held_tokens, layout_of, whole_rows


def recipe(workers: int, **assign: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "corpus": {"path": "corpus"},
            "data": {"mode": "documents", "sequence_length": 100, "assign": assign},
            "train": {"steps": 1},
            "cluster": {"workers": workers},
        }
    )


def documents(used: Recipe) -> DocumentData:
    assert isinstance(used.data, DocumentData)
    return used.data


def test_workers_make_up_groups() -> None:
    used = recipe(8, context=4, widths=[2])
    layout = layout_of(used, documents(used))
    assert (layout.groups, layout.context, layout.widths) == (2, 4, (1, 2, 4))
    assert layout.barrier == "none"
    assert held_tokens(documents(used), 8) == 25
    assert whole_rows(used, 9) == 2
    assert whole_rows(used, 1) == 1


def test_one_process_shares_nothing() -> None:
    used = recipe(0, context=4, widths=[2])
    layout = layout_of(used, documents(used))
    assert (layout.groups, layout.context, layout.widths) == (1, 1, (1,))
    assert context_of(documents(used), 0) == 1
    assert held_tokens(documents(used), 0) == 100


def test_rows_of_a_packed_run_are_rows() -> None:
    used = recipe(2).model_copy(update={"data": PackedData()})
    assert whole_rows(used, 7) == 7


@pytest.mark.parametrize(
    ("workers", "assign", "says"),
    [
        (6, {"context": 4}, "the 6 workers of cluster.workers do not make up groups"),
        (4, {"context": 4, "widths": [3]}, "3 does not divide context = 4"),
        (4, {"planner": "refined"}, "refine"),
    ],
)
def test_groups_that_cannot_be_are_refused(workers: int, assign: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipe(workers, **assign)
