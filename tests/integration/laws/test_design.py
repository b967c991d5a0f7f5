"""Designs on the simplex: within limits, without repeats, and as good as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import LawError
from raymix.laws.design import (
    check_limits,
    d_optimal_design,
    dirichlet_design,
    features_for,
    leave_one_out,
    space_filling_design,
    vertices,
    within_limits,
)
from raymix.laws.table import Floats

DESIGNS: dict[str, Callable[[int, Floats, Floats, int], Floats]] = {
    "dirichlet": lambda runs, low, high, seed: dirichlet_design(
        runs, np.arange(1.0, low.size + 1), concentration=1, floor_D=low, cap_D=high, seed=seed
    ),
    "space_filling": lambda runs, low, high, seed: space_filling_design(
        runs, floor_D=low, cap_D=high, seed=seed
    ),
    "d_optimal": lambda runs, low, high, seed: d_optimal_design(
        runs, features_for("bimix"), floor_D=low, cap_D=high, seed=seed
    ),
}


@st.composite
def limits(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Return floors and caps between which there is room."""
    size = draw(st.integers(2, 8))
    part = draw(st.floats(0, 0.8))
    raw = np.array(draw(st.lists(st.floats(0.01, 1), min_size=size, max_size=size)))
    low = part * raw / raw.sum()
    room = np.array(draw(st.lists(st.floats(0.05, 1), min_size=size, max_size=size)))
    high = np.minimum(1.0, low + (1.3 * (1 - part) * room / room.sum()))
    if high.sum() <= 1.02:
        high = np.ones(size)
    return low, high


@pytest.mark.parametrize("name", DESIGNS)
@settings(max_examples=15)
@given(bounds=limits(), runs=st.integers(1, 12), seed=st.integers(0, 99))
def test_designs_keep_to_the_simplex_and_the_limits(
    name: str, bounds: tuple[Floats, Floats], runs: int, seed: int
) -> None:
    low, high = bounds
    share_ND = DESIGNS[name](runs, low, high, seed)
    assert share_ND.shape == (runs, low.size)
    np.testing.assert_allclose(share_ND.sum(axis=1), 1, atol=1e-12)
    assert (share_ND >= low - 1e-9).all()
    assert (share_ND <= high + 1e-9).all()
    assert len(np.unique(share_ND.round(7), axis=0)) == runs
    np.testing.assert_array_equal(share_ND, DESIGNS[name](runs, low, high, seed))


@given(bounds=limits(), seed=st.integers(0, 99))
def test_nearest_within_limits_is_one_factor_for_all_free_shares(
    bounds: tuple[Floats, Floats], seed: int
) -> None:
    low, high = bounds
    expected = np.random.default_rng(seed).dirichlet(np.ones(low.size), 3)
    actual = within_limits(expected, low, high)
    np.testing.assert_allclose(actual.sum(axis=1), 1, atol=1e-12)
    for row, expected_row in zip(actual, expected, strict=True):
        free = (row > low + 1e-9) & (row < high - 1e-9)
        np.testing.assert_allclose(
            np.ptp(row[free] / expected_row[free]) if free.any() else 0, 0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["dirichlet", "space_filling"])
def test_more_runs_keep_the_first_ones(name: str) -> None:
    low, high = np.zeros(5), np.ones(5)
    np.testing.assert_array_equal(
        DESIGNS[name](6, low, high, 3), DESIGNS[name](9, low, high, 3)[:6]
    )


def test_a_dirichlet_is_around_its_prior() -> None:
    prior, low, high = np.array([0.6, 0.3, 0.1]), np.zeros(3), np.ones(3)
    near, far = (
        dirichlet_design(4000, prior, concentration=c, floor_D=low, cap_D=high, seed=0)
        for c in (20, 0.5)
    )
    np.testing.assert_allclose(near.mean(axis=0), prior, atol=0.01)
    np.testing.assert_allclose(far.mean(axis=0), prior, atol=0.02)
    # Var = p (1 - p) / (sum of the parameters + 1), the parameters being c x 3 x prior.
    np.testing.assert_allclose(near.var(axis=0), prior * (1 - prior) / 61, rtol=0.1)
    np.testing.assert_allclose(far.var(axis=0), prior * (1 - prior) / 2.5, rtol=0.1)


def test_space_filling_leaves_smaller_holes_than_draws() -> None:
    low, high = np.zeros(4), np.ones(4)
    probes = np.random.default_rng(5).dirichlet(np.ones(4), 500)

    def hole(share_ND: Floats) -> float:
        apart = np.linalg.norm(np.sqrt(probes)[:, None] - np.sqrt(share_ND)[None], axis=2)
        return float(apart.min(axis=1).mean())

    filled = [hole(space_filling_design(12, floor_D=low, cap_D=high, seed=s)) for s in range(5)]
    drawn = [hole(np.random.default_rng(s).dirichlet(np.ones(4), 12)) for s in range(20)]
    assert max(filled) < np.mean(drawn)


def test_the_d_optimal_design_of_a_linear_law_is_the_vertices() -> None:
    # Scheffe's linear model of mixtures: the vertices are D-optimal (Scheffe 1958).
    low, high = np.zeros(4), np.ones(4)
    share_ND = d_optimal_design(4, features_for("regression"), floor_D=low, cap_D=high, seed=0)
    np.testing.assert_allclose(np.sort(share_ND.max(axis=1)), 1, atol=1e-4)
    assert sorted(share_ND.argmax(axis=1)) == [0, 1, 2, 3]


def test_vertices_and_leave_one_out() -> None:
    low, high = np.array([0.1, 0.1, 0.0]), np.array([1.0, 0.5, 1.0])
    np.testing.assert_allclose(
        vertices(low, high), [[0.9, 0.1, 0], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], atol=1e-5
    )
    left = leave_one_out(np.array([0.5, 0.25, 0.25]), low, high)
    np.testing.assert_allclose(
        left, [[0.1, 0.45, 0.45], [0.6, 0.1, 0.3], [2 / 3, 1 / 3, 0]], atol=1e-9
    )


def test_limits_without_room_are_refused() -> None:
    names = ("books", "code")
    with pytest.raises(LawError) as caught:
        check_limits(np.array([0.6, 0.5]), np.array([0.5, 0.4]), names)
    messages = "\n".join(caught.value.problems)
    for words in ("floor of books = 0.6", "above its cap of 0.5", "sum to 1 or more", "no choice"):
        assert words in messages
    with pytest.raises(LawError, match="two domains"):
        check_limits(np.zeros(1), np.ones(1), ("books",))
    with pytest.raises(LawError, match="different mixtures"):
        dirichlet_design(
            5, np.ones(2), concentration=1, floor_D=np.zeros(2),
            cap_D=np.array([0.5, 0.5 + 2e-7]), seed=0,
        )  # fmt: skip
