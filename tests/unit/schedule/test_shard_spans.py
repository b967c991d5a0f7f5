"""Shards of a sequence: every token on one rank, equal sizes, equal work."""

from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raymix.recipe.training import PlannerName
from raymix.schedule import known_planners
from raymix.schedule.cost.model import shard_tokens
from raymix.schedule.shard_spans import shard_positions, shard_spans


@given(st.integers(1, 500), st.integers(1, 16))
def test_shards_hold_every_token_once_and_are_as_large_as_planned(length: int, width: int) -> None:
    shards = [shard_positions(length, width, index) for index in range(width)]
    assert {len(positions) for positions in shards} == {int(shard_tokens(length, width))}
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(shards[0]) * width))


@given(st.integers(1, 40), st.integers(1, 16))
def test_ranks_do_equal_causal_work_where_lengths_divide(half: int, width: int) -> None:
    length = 2 * half * width
    work = {int((shard_positions(length, width, index) + 1).sum()) for index in range(width)}
    assert len(work) == 1


def test_the_first_rank_has_the_front_and_the_back() -> None:
    assert shard_spans(16, 4, 0) == ((0, 2), (14, 16))
    assert shard_spans(16, 4, 3) == ((6, 8), (8, 10))
    # Three tokens each: two of them from the front.
    assert shard_positions(11, 4, 0).tolist() == [0, 1, 11]


def test_a_recipe_may_name_every_planner() -> None:
    assert set(get_args(PlannerName)) == set(known_planners())
