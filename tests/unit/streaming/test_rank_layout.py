"""Which workers may share documents: what the recipe says, and what it may not say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raymix.errors import ScheduleError
from raymix.recipe import DocumentData, Recipe
from raymix.recipe.training import PackedData
from raymix.schedule import CostModel, Layout, get_planner, plan_batch, training_planner
from raymix.training.step.rank_layout import (
    context_parallel_size,
    full_length_rows,
    layout_of,
    tokens_per_rank,
)


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
    assert tokens_per_rank(documents(used), 8) == 25
    assert full_length_rows(used, 9) == 2
    assert full_length_rows(used, 1) == 1


def test_one_process_shares_nothing() -> None:
    used = recipe(0, context=4, widths=[2])
    layout = layout_of(used, documents(used))
    assert (layout.groups, layout.context, layout.widths) == (1, 1, (1,))
    assert context_parallel_size(documents(used), 0) == 1
    assert tokens_per_rank(documents(used), 0) == 100


def test_rows_of_a_packed_run_are_rows() -> None:
    used = recipe(2).model_copy(update={"data": PackedData()})
    assert full_length_rows(used, 7) == 7


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


def test_the_whole_search_is_for_steps_that_last() -> None:
    """Up to 24 documents `refine` anneals; a step of milliseconds would wait for it."""
    lengths = np.random.default_rng(3).integers(2, 4000, 12)
    layout = Layout(1, 2)
    quick = CostModel(quadratic_s=1e-12, linear_s=1e-8, piece_s=1e-4, memory_tokens=9000)
    slow = CostModel(quadratic_s=1e-8, linear_s=1e-4, piece_s=1.0, memory_tokens=9000)
    planner = training_planner("refine")
    whole = plan_batch(lengths, layout, slow)
    assert planner.plan(lengths, layout, slow).seconds == whole.seconds > 1
    assert (
        planner.plan(lengths, layout, quick).seconds >= plan_batch(lengths, layout, quick).seconds
    )
    assert training_planner("packed") is get_planner("packed")
    with pytest.raises(ScheduleError, match="Did you mean 'refine'"):
        training_planner("refin")
