"""The allocator: closed forms, a naive reference, and the two proved bounds under adversaries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import CorpusError, RaymixError, RecipeError
from raymix.sampling import SHARE_BITS, Allocator, fixed_point, realized_error_bound
from raymix.sampling.shares import Ints, restricted

ROW = 1 << SHARE_BITS


def one_by_one(carry_D: Ints, q_D: Ints, budget: int) -> tuple[Ints, Ints]:
    """The rule as the module states it: fill, then take single rows from the largest."""
    used = np.flatnonzero(q_D)
    carry_D, count_D = carry_D + budget * q_D, np.zeros_like(q_D)
    for _ in range(budget):
        largest = used[np.argmax(carry_D[used])]
        carry_D[largest] -= ROW
        count_D[largest] += 1
    return carry_D, count_D


def weights(n_domains: int, *, zeros: bool) -> st.SearchStrategy[list[float]]:
    """Weights over many orders of magnitude, one of them surely positive."""
    low = 0.0 if zeros else 1e-9
    one = st.one_of(st.sampled_from([low, 1e-9, 1.0]), st.floats(low, 1.0, allow_subnormal=False))
    return st.lists(one, min_size=n_domains, max_size=n_domains).filter(lambda w: sum(w) > 0)


@st.composite
def runs(draw: st.DrawFn, *, zeros: bool) -> tuple[int, list[tuple[list[float], int]]]:
    """A number of domains and the (weights, budget) of each step."""
    n_domains = draw(st.one_of(st.integers(1, 9), st.just(60)))
    step = st.tuples(weights(n_domains, zeros=zeros), st.integers(1, 40))
    return n_domains, draw(st.lists(step, min_size=1, max_size=10))


def test_halves_and_quarters_come_out_exactly_in_every_step() -> None:
    counts_SD = Allocator(3).allocate_steps(fixed_point([0.5, 0.25, 0.25]), 4, 50)
    assert (counts_SD == [2, 1, 1]).all()


def test_thirds_take_turns_from_the_lowest_index() -> None:
    counts_SD = Allocator(3).allocate_steps(fixed_point([1, 1, 1]), 1, 6)
    assert counts_SD.argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2]


def test_one_domain_gets_everything_and_carries_nothing() -> None:
    allocator = Allocator(1)
    assert allocator.allocate(fixed_point([0.3]), 7).tolist() == [7]
    assert allocator.carry_D.tolist() == [0]


@settings(max_examples=50)
@given(runs(zeros=True))
def test_it_is_the_one_by_one_rule(run: tuple[int, list[tuple[list[float], int]]]) -> None:
    n_domains, steps = run
    allocator, carry_D = Allocator(n_domains), np.zeros(n_domains, dtype=np.int64)
    for weights_D, budget in steps:
        q_D = fixed_point(weights_D)
        carry_D, count_D = one_by_one(carry_D, q_D, budget)
        assert allocator.allocate(q_D, budget).tolist() == count_D.tolist()
        assert allocator.carry_D.tolist() == carry_D.tolist()


@settings(max_examples=50)
@given(runs(zeros=False))
def test_every_prefix_is_within_the_bound_of_what_was_asked(
    run: tuple[int, list[tuple[list[float], int]]],
) -> None:
    n_domains, steps = run
    allocator = Allocator(n_domains)
    requested_D = [0] * n_domains
    for weights_D, budget in steps:
        q_D = fixed_point(weights_D)
        count_D = allocator.allocate(q_D, budget)
        assert count_D.sum() == budget
        requested_D = [
            requested + budget * int(q) for requested, q in zip(requested_D, q_D, strict=True)
        ]
        trailing = [
            (requested - int(got) * ROW) / ROW
            for requested, got in zip(requested_D, allocator.count_D, strict=True)
        ]
        assert max(trailing) <= realized_error_bound(n_domains)
        assert min(trailing) >= -(1 - 1 / n_domains)


@settings(max_examples=50)
@given(runs(zeros=True))
def test_domains_may_leave_and_return_within_the_wider_bound(
    run: tuple[int, list[tuple[list[float], int]]],
) -> None:
    n_domains, steps = run
    allocator = Allocator(n_domains)
    for weights_D, budget in steps:
        count_D = allocator.allocate(fixed_point(weights_D), budget)
        assert (count_D[np.array(weights_D) == 0] == 0).all()
        assert count_D.sum() == budget
        assert allocator.carry_D.sum() == 0
        bound = realized_error_bound(n_domains, same_domains=False)
        assert np.abs(allocator.carry_D).max() <= bound * ROW


def untaken_share_alike(allocator: Allocator) -> Ints:
    """Equal shares to the domains not yet taken from, next to nothing to the others."""
    untaken_D = allocator.count_D == 0
    return fixed_point(np.where(untaken_D, 1.0, 1e-9))


def more_to_the_largest(allocator: Allocator) -> Ints:
    """Nearly everything to whoever trails most already."""
    weights_D = np.full(allocator.carry_D.size, 1e-6)
    weights_D[np.argmax(allocator.carry_D)] = 1
    return fixed_point(weights_D)


def level_the_top(allocator: Allocator) -> Ints:
    """Raise the upper half to one level: then the largest falls and the rest stay high."""
    carry_D = allocator.carry_D / ROW
    upper_D = carry_D >= np.median(carry_D)
    gap_D = np.where(upper_D, carry_D[upper_D].max() - carry_D, 0.0)
    return fixed_point(gap_D + np.where(upper_D, 1e-2, 1e-6))


@pytest.mark.parametrize("adversary", [untaken_share_alike, more_to_the_largest, level_the_top])
@pytest.mark.parametrize("n_domains", [2, 3, 8, 60])
@pytest.mark.parametrize("budget", [1, 5])
def test_no_adversary_gets_past_the_bound(
    adversary: Callable[[Allocator], Ints], n_domains: int, budget: int
) -> None:
    allocator = Allocator(n_domains)
    for step in range(300):
        if step % 75 == 0:
            allocator.count_D[:] = 0
        allocator.allocate(adversary(allocator), budget)
        assert allocator.carry_D.max() <= realized_error_bound(n_domains) * ROW + 1
        assert allocator.carry_D.min() >= -(1 - 1 / n_domains) * ROW - 1


@pytest.mark.parametrize("n_domains", [2, 8, 30])
def test_the_bound_is_tight(n_domains: int) -> None:
    allocator = Allocator(n_domains)
    for _ in range(n_domains - 1):
        allocator.allocate(untaken_share_alike(allocator), 1)
    bound = realized_error_bound(n_domains)
    assert bound - 1e-3 < allocator.carry_D.max() / ROW <= bound


def test_the_bound_for_changing_domains_is_tight() -> None:
    # Two neighbors in rank are brought to one level, which puts 1 row between them.
    allocator = Allocator(5)
    for turn in range(400):
        order = np.argsort(allocator.carry_D, kind="stable")
        low, high = order[turn % 4], order[turn % 4 + 1]
        gap = min(1.0, (allocator.carry_D[high] - allocator.carry_D[low]) / ROW)
        weights_D = np.zeros(5)
        weights_D[low], weights_D[high] = (1 + gap) / 2, (1 - gap) / 2
        allocator.allocate(fixed_point(weights_D), 1)
        assert np.abs(allocator.carry_D).max() <= 2 * ROW
    assert allocator.carry_D.max() > 1.9 * ROW


def test_a_switch_after_100_000_rows_holds_from_the_next_step() -> None:
    allocator = Allocator(2)
    allocator.allocate_steps(fixed_point([0.5, 0.5]), 10, 10_000)
    counts_SD = allocator.allocate_steps(fixed_point([0.9, 0.1]), 10, 100)
    assert (np.abs(counts_SD - [9, 1]) <= 1).all()
    requested_S = 9 * np.arange(1, 101)
    assert (np.abs(counts_SD[:, 0].cumsum() - requested_S) <= 1).all()


def test_ten_thousand_domains_with_changing_weights_stay_in_bounds() -> None:
    n_domains, budget = 10_000, 1024
    rng = np.random.default_rng(0)
    allocator = Allocator(n_domains)
    bound = realized_error_bound(n_domains)
    for _ in range(15):
        q_D = fixed_point(rng.dirichlet(np.full(n_domains, 0.05)) + 1e-9)
        counts_SD = allocator.allocate_steps(q_D, budget, 3)
        assert (counts_SD.sum(axis=1) == budget).all()
        assert -ROW < allocator.carry_D.min() < allocator.carry_D.max() <= bound * ROW


def test_ten_thousand_domains_agree_with_the_one_by_one_rule() -> None:
    rng = np.random.default_rng(1)
    allocator, carry_D = Allocator(10_000), np.zeros(10_000, dtype=np.int64)
    for _ in range(3):
        q_D = fixed_point(rng.dirichlet(np.full(10_000, 0.1)) * (rng.random(10_000) < 0.7))
        carry_D, count_D = one_by_one(carry_D, q_D, 200)
        assert (allocator.allocate(q_D, 200) == count_D).all()


@settings(max_examples=50)
@given(runs(zeros=True), st.data())
def test_limits_are_never_passed_and_the_rest_is_shared(
    run: tuple[int, list[tuple[list[float], int]]], data: st.DataObject
) -> None:
    n_domains, steps = run
    limit = st.integers(0, 60)
    limit_D = np.array(data.draw(st.lists(limit, min_size=n_domains, max_size=n_domains)))
    allocator = Allocator(n_domains, limit_D)
    for weights_D, budget in steps:
        before_D = allocator.count_D.copy()
        used_D = np.array(weights_D) > 0
        left = int((limit_D - before_D)[used_D].sum())
        if left < budget:
            with pytest.raises(CorpusError):
                allocator.allocate(fixed_point(weights_D), budget)
            assert (allocator.count_D == before_D).all()
            break
        count_D = allocator.allocate(fixed_point(weights_D), budget)
        assert count_D.sum() == budget
        assert (count_D[~used_D] == 0).all()
        assert (allocator.count_D <= limit_D).all()
        bound = realized_error_bound(n_domains, same_domains=False)
        assert np.abs(allocator.carry_D).max() <= bound * ROW


def test_at_its_limit_a_domain_gets_what_is_left_and_the_others_its_share() -> None:
    allocator = Allocator(3, np.array([7, 1000, 1000]))
    counts_SD = allocator.allocate_steps(fixed_point([0.5, 0.25, 0.25]), 8, 6)
    assert counts_SD[:2].tolist() == [[4, 2, 2], [3, 3, 2]]
    assert (counts_SD[2:] == [0, 4, 4]).all()
    assert counts_SD.sum(axis=0).tolist() == [7, 21, 20]


def test_rows_for_some_of_the_steps_give_those_then_an_error_that_names_step_and_domains() -> None:
    allocator = Allocator(2, np.array([10, 10]), names=("web", "books"))
    q_D = fixed_point([0.5, 0.5])
    assert len(allocator.allocate_steps(q_D, 6, 100)) == 3
    with pytest.raises(CorpusError, match=r"step = 3: .*web, books.*max_epochs") as caught:
        allocator.allocate_steps(q_D, 6, 100, first_step=3)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RaymixError)


@pytest.mark.parametrize("budget", [0, 1 << 22])
def test_a_budget_that_int64_cannot_hold_is_refused(budget: int) -> None:
    with pytest.raises(RecipeError, match="rows_per_step"):
        Allocator(3).allocate(fixed_point([1, 1, 1]), budget)


def test_the_largest_batch_of_a_recipe_fits() -> None:
    allocator = Allocator(10_000)
    q_D = fixed_point(np.arange(1, 10_001))
    counts_SD = allocator.allocate_steps(q_D, 1 << 20, 2)
    assert (counts_SD.sum(axis=1) == 1 << 20).all()
    assert np.abs(counts_SD / (1 << 20) - q_D / ROW).max() < 1e-5


def test_a_copy_goes_its_own_way() -> None:
    allocator = Allocator(3)
    twin = allocator.copy()
    allocator.allocate(fixed_point([1, 2, 4]), 5)
    assert twin.count_D.tolist() == [0, 0, 0]
    assert twin.allocate(fixed_point([1, 2, 4]), 5).tolist() == allocator.count_D.tolist()


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=1, max_size=40))
def test_fixed_point_is_exact_to_one_unit_and_sums_to_one(weights_D: list[float]) -> None:
    if not any(weights_D):
        with pytest.raises(ValueError, match="all zero"):
            fixed_point(weights_D)
        return
    q_D = fixed_point(weights_D)
    share_D = np.array(weights_D) / sum(weights_D)
    assert q_D.sum() == ROW
    assert ((q_D > 0) == (share_D > 0)).all()
    assert np.abs(q_D - share_D * ROW).max() <= 1 + (share_D < 1 / ROW).sum()


@pytest.mark.parametrize("bad", [[0.5, -0.1], [0.5, float("nan")], [float("inf"), 1.0]])
def test_fixed_point_refuses_what_is_no_weight(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        fixed_point(bad)


@given(weights(7, zeros=True), st.lists(st.booleans(), min_size=7, max_size=7))
def test_restricted_shares_keep_their_proportions(
    weights_D: list[float], open_D: list[bool]
) -> None:
    q_D = fixed_point(weights_D)
    out_D = restricted(q_D, np.array(open_D))
    mask_D = np.array(open_D) & (q_D > 0)
    if not mask_D.any():
        assert (out_D == 0).all()
        return
    assert out_D.sum() == ROW
    exact = [int(q) * ROW / int(q_D[mask_D].sum()) for q in q_D[mask_D]]
    assert np.abs(out_D[mask_D] - exact).max() <= 1
    assert (out_D[~mask_D] == 0).all()


def test_the_bounds_by_hand() -> None:
    assert realized_error_bound(1) == 0
    assert realized_error_bound(2) == 0.5
    assert realized_error_bound(4) == pytest.approx(1 / 2 + 1 / 3 + 1 / 4)
    assert realized_error_bound(10_000) < 8.8
    assert realized_error_bound(9, same_domains=False) == 4
