"""The exact optimum of a sum of powers: against grids, a general solver, and its own proof."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from raymix.errors import LawError
from raymix.laws import Region, SeparableOptimum, separable_optimum
from raymix.laws.table import Floats


def region_of(rng: np.random.Generator, size: int) -> Region:
    """Return limits that often bind: floors of up to half the total, caps of up to 3 / size."""
    low = rng.dirichlet(np.ones(size)) * rng.uniform(0, 0.5) * (rng.random(size) < 0.5)
    high = np.minimum(1, low + rng.uniform(0.5, 3, size) / size)
    lacking = max(0.0, 1 - high.sum())
    return Region(low_A=low, high_A=np.minimum(1, high + lacking))


def instance(seed: int, size: int | None = None) -> tuple[Floats, Floats, Floats, Region]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 11)) if size is None else size
    scale = rng.lognormal(0, 1, size)
    return (
        scale,
        rng.uniform(0.05, 1, size),
        rng.choice([0, 1e-3]) * np.ones(size),
        region_of(rng, size),
    )


def by_solver(
    scale: Floats, exponent: Floats, offset: Floats, region: Region
) -> tuple[Floats, float]:
    """Return shares and value of SLSQP, started again where it stops until it gains nothing."""
    share, value = region.center(np.full(scale.size, 1 / scale.size)), np.inf
    low = np.maximum(region.low_A, 1e-9)
    for _ in range(20):
        actual = minimize(
            lambda r: float((scale * (r + offset) ** -exponent).sum()),
            share,
            jac=lambda r: -exponent * scale * (r + offset) ** (-exponent - 1),
            method="SLSQP",
            bounds=list(zip(low, np.maximum(region.high_A, low), strict=True)),
            constraints={"type": "eq", "fun": lambda r: r.sum() - 1, "jac": np.ones_like},
            options={"maxiter": 300, "ftol": 1e-15},
        )
        # Its shares miss 1 by more than what is compared here.
        share = region.project(np.log(np.maximum(actual.x, 1e-300)))
        now = float((scale * (share + offset) ** -exponent).sum())
        if now >= value - 1e-14 * value:
            break
        value = now
    return share, value


def check_solution(actual: SeparableOptimum, region: Region) -> None:
    assert abs(actual.share_D.sum() - 1) < 1e-12
    assert (actual.share_D >= region.low_A).all()
    assert (actual.share_D <= region.high_A).all()
    assert 0 <= actual.gap <= 1e-12 * actual.value


@pytest.mark.parametrize("seed", range(60))
def test_no_general_solver_does_better(seed: int) -> None:
    scale, exponent, offset, region = instance(seed)
    actual = separable_optimum(scale, exponent, region, offset_D=offset)
    check_solution(actual, region)
    _, value = by_solver(scale, exponent, offset, region)
    assert actual.value <= value * (1 + 1e-9)
    assert actual.value == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_no_point_of_a_grid_does_better(seed: int, size: int) -> None:
    scale, exponent, offset, region = instance(seed, size)
    actual = separable_optimum(scale, exponent, region, offset_D=offset)
    # A grid over the box around the answer and over all of it, the last share being what is left.
    for width in (1.0, 1e-2, 1e-4, 1e-6):
        axes = [
            np.linspace(max(low, r - width), min(high, r + width), 161)
            for low, high, r in zip(
                region.low_A[:-1], region.high_A[:-1], actual.share_D[:-1], strict=True
            )
        ]
        grid = np.array(list(itertools.product(*axes)))
        grid = np.column_stack([grid, 1 - grid.sum(axis=1)])
        inside = (grid[:, -1] >= region.low_A[-1]) & (grid[:, -1] <= region.high_A[-1])
        grid = grid[inside & (grid + offset > 0).all(axis=1)]
        values = (scale * (grid + offset) ** -exponent).sum(axis=1)
        assert values.min(initial=np.inf) >= actual.value * (1 - 1e-13)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 40), spread=st.floats(0, 12))
def test_shares_are_exact_and_proved_for_any_scales(seed: int, size: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    region = region_of(rng, size)
    scale = rng.lognormal(0, spread, size) * (rng.random(size) < 0.9)
    exponent = rng.uniform(0, 3, size)
    actual = separable_optimum(scale, exponent, region)
    assert abs(actual.share_D.sum() - 1) < 1e-12
    assert (actual.share_D >= region.low_A).all()
    assert (actual.share_D <= region.high_A).all()
    assert actual.gap <= 1e-9 * actual.value


def test_without_limits_shares_follow_the_formula() -> None:
    scale, a = np.array([1.0, 8.0]), 0.5
    share = scale ** (1 / (1 + a))
    actual = separable_optimum(scale, np.full(2, a), Region(low_A=np.zeros(2), high_A=np.ones(2)))
    np.testing.assert_allclose(actual.share_D, share / share.sum(), rtol=1e-13)


def test_a_domain_that_does_not_count_gets_its_floor_or_what_is_left() -> None:
    scale, exponent = np.array([1.0, 0.0, 1.0]), np.full(3, 0.3)
    low, high = np.array([0.0, 0.1, 0.0]), np.ones(3)
    actual = separable_optimum(scale, exponent, Region(low_A=low, high_A=high))
    np.testing.assert_allclose(actual.share_D, [0.45, 0.1, 0.45])
    high = np.array([0.2, 1.0, 0.3])
    actual = separable_optimum(scale, exponent, Region(low_A=low, high_A=high))
    np.testing.assert_allclose(actual.share_D, [0.2, 0.5, 0.3])
    assert actual.gap == 0


def test_floors_that_fill_everything_are_the_answer() -> None:
    low = np.array([0.25, 0.75])
    region = Region(low_A=low, high_A=np.ones(2))
    actual = separable_optimum(np.ones(2), np.ones(2), region)
    np.testing.assert_allclose(actual.share_D, low)


def test_a_thousand_domains_take_few_evaluations_and_stay_exact() -> None:
    scale, exponent, offset, region = instance(0, 1000)
    check_solution(separable_optimum(scale, exponent, region, offset_D=offset), region)


def test_what_no_law_has_is_refused() -> None:
    region = Region(low_A=np.zeros(2), high_A=np.array([0.0, 1.0]))
    with pytest.raises(LawError, match=r"law\.scale\[1\] = -1\.0: not allowed"):
        separable_optimum(np.array([0.0, -1.0]), np.ones(2), region)
    with pytest.raises(LawError, match=r"caps\[0\] = 0\.0: the law predicts an infinite loss"):
        separable_optimum(np.ones(2), np.ones(2), region)
