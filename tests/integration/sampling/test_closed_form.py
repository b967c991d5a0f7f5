"""The closed form against the rule it replaces, row by row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.sampling import Allocator, fixed_point
from raymix.sampling.closed_form import closed_form

weights = st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=1, max_size=12).filter(any)


def one_by_one(allocator: Allocator, q_D: np.ndarray, budget: int, steps: int) -> np.ndarray:
    """Return the rows of steps allocated each by itself, which the closed form never sees."""
    return np.stack([allocator.allocate(q_D, budget) for _ in range(steps)])


@settings(max_examples=150)
@given(pieces=st.lists(weights, min_size=1, max_size=4), budget=st.integers(1, 40))
def test_many_steps_at_once_are_the_steps_one_by_one(
    pieces: list[list[float]], budget: int
) -> None:
    count = max(map(len, pieces))
    fast, slow = Allocator(count), Allocator(count)
    for piece in pieces:
        q_D = fixed_point(piece + [0.0] * (count - len(piece)))
        together = fast.allocate_steps(q_D, budget, 60)
        np.testing.assert_array_equal(together, one_by_one(slow, q_D, budget, 60))
        np.testing.assert_array_equal(fast.carry_D, slow.carry_D)
        np.testing.assert_array_equal(fast.count_D, slow.count_D)


@given(
    piece=weights,
    budget=st.integers(1, 9),
    limits=st.lists(st.integers(0, 200), min_size=12, max_size=12),
)
def test_limits_are_respected_alike(piece: list[float], budget: int, limits: list[int]) -> None:
    q_D = fixed_point(piece)
    limit_D = np.array(limits[: len(piece)])
    limit_D[int(np.argmax(q_D))] = 10**9
    fast, slow = Allocator(len(piece), limit_D), Allocator(len(piece), limit_D)
    together = fast.allocate_steps(q_D, budget, 80)
    np.testing.assert_array_equal(together, one_by_one(slow, q_D, budget, 80))
    np.testing.assert_array_equal(fast.carry_D, slow.carry_D)


def test_it_lasts_where_every_domain_has_a_row_a_step() -> None:
    q_D = fixed_point([0.3, 0.2, 0.15, 0.12, 0.1, 0.13])
    assert len(closed_form(np.zeros(6, np.int64), 32 * q_D, 5000)) == 5000


def test_it_stops_before_a_domain_would_have_to_give_a_row_back() -> None:
    q_D = fixed_point(np.geomspace(0.5, 0.001, 40))
    counts_SD = closed_form(np.zeros(40, np.int64), 64 * q_D, 5000)
    assert 0 < len(counts_SD) < 5000
    np.testing.assert_array_equal(counts_SD, one_by_one(Allocator(40), q_D, 64, len(counts_SD)))
