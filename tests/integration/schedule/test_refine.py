"""`refine` against the best there is, against the planners it starts from, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from raymix.errors import ScheduleError
from raymix.schedule import (
    CostModel,
    Layout,
    Link,
    known_distributions,
    lower_bound,
    plan_batch,
    preset,
    sample_lengths,
    solve_exact,
)
from tests.support.scheduling import PLAIN, cost_of, full_cost, problems


def test_equal_sequences_sit_one_on_each_rank() -> None:
    cost = full_cost()
    schedule = plan_batch([50] * 8, Layout(2, 4), cost)
    assert schedule.micro_steps == 1
    assert schedule.placement.width_K.tolist() == [1] * 8
    alone = 1e-4 * 2500 + 2e-3 * 50 + 0.01 + max(0.2, 0.05 + 0.5)
    assert schedule.seconds == pytest.approx(alone)


def test_one_long_sequence_is_sharded_and_short_ones_hide_its_communication() -> None:
    """Sharded 80 takes as long to gather as a rank's local 40 takes to attend."""
    cost = CostModel(
        quadratic_s=1e-3, linear_s=0.0, links=(Link(2, 0.0, 0.02),), memory_tokens=1000
    )
    schedule = plan_batch([80, 40, 40], Layout(1, 2), cost)
    # 80^2 / 2 / 1000 on both, beside the larger of 1.6 to gather and 1.6 of local attention.
    assert schedule.seconds == pytest.approx(3.2 + 1.6)
    assert schedule.placement.width_K.tolist() == [2, 1, 1]


def test_where_communication_is_slow_nothing_is_sharded_that_need_not_be() -> None:
    slow = replace(PLAIN, links=(Link(4, 10.0, 1.0),))
    assert set(plan_batch([90, 50, 20, 5], Layout(1, 4), slow).placement.width_K.tolist()) == {1}
    assert plan_batch([101], Layout(1, 4), slow).placement.width_K.tolist() == [4]


def test_where_it_is_free_perfect_balance_is_found() -> None:
    schedule = plan_batch([100, 60, 20, 20], Layout(1, 4), PLAIN)
    bound = lower_bound(np.array([100, 60, 20, 20]), Layout(1, 4), PLAIN)
    assert schedule.seconds == pytest.approx(bound, rel=2e-3)


def test_widths_between_one_rank_and_the_group_pay_where_short_shards_are_slow() -> None:
    cost = cost_of(edge_s=2e-3, memory_tokens=60)
    lengths = [110, 110, 110, 110]
    two = plan_batch(lengths, Layout(1, 8), cost).seconds
    many = plan_batch(lengths, Layout(1, 8, widths=(2, 4)), cost)
    assert many.placement.width_K.tolist() == [2] * 4
    assert many.seconds < two


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=16))
def test_it_is_never_slower_than_what_it_starts_from(
    problem: tuple[list[int], Layout, CostModel],
) -> None:
    lengths, layout, cost = problem
    best = min(plan_batch(lengths, layout, cost, name).seconds for name in ("packed", "hdp"))
    assert plan_batch(lengths, layout, cost).seconds <= best * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_the_best_there_is(seed: int) -> None:
    """A small sample; the benchmark of schedules compares a hundred and more."""
    name = known_distributions()[seed % 7]
    assumed = preset("0.5b", ("nvlink", "slow")[seed % 2])
    lengths = np.sort(sample_lengths(name, 8 + seed % 2, seed=seed, longest=30_000))[::-1]
    room = max(-(-int(lengths[0]) // 2), int(lengths.sum() / 3))
    cost = replace(assumed, memory_tokens=room)
    layout = Layout(1 + seed % 2, 2)
    exact = solve_exact(lengths, layout, cost, gap=1e-3)
    assert exact.bound <= exact.seconds * (1 + 1e-9)
    plan = plan_batch(lengths, layout, cost)
    assert plan.seconds <= 1.05 * exact.seconds
    # Its own micro-batches may be more than the program was allowed.
    assert plan.seconds >= exact.bound * (1 - 2e-3) or plan.micro_steps > 2


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=5).filter(lambda problem: problem[1].ranks <= 6))
def test_the_exact_planner_says_what_its_plan_takes(
    problem: tuple[list[int], Layout, CostModel],
) -> None:
    lengths, layout, cost = problem
    layout = replace(layout, barrier="group")
    exact = solve_exact(np.sort(np.array(lengths))[::-1], layout, cost)
    plan = plan_batch(lengths, layout, cost, "milp")
    assert plan.seconds == pytest.approx(exact.seconds, rel=1e-3)


def test_exact_plans_are_for_small_batches() -> None:
    with pytest.raises(ScheduleError, match="choices for an exact plan, at most 6000"):
        plan_batch([10] * 128, Layout(4, 8), PLAIN, "milp")


@pytest.mark.parametrize("barrier", ["group", "all", "none"])
def test_fewer_barriers_are_never_slower(barrier: str) -> None:
    cost = preset("0.5b", "slow")
    lengths = sample_lengths("chatqa2", 24, seed=1, longest=100_000)
    free = plan_batch(lengths, Layout(2, 4, barrier="none"), cost).seconds
    layout = Layout(2, 4, barrier=barrier)  # type: ignore[arg-type] # one of the three
    assert plan_batch(lengths, layout, cost).seconds >= free * 0.98
