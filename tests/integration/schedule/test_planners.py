"""The laws of schedules, for every planner: nothing lost, nothing too full, everybody in step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

import raymix
from raymix.errors import ScheduleError
from raymix.schedule import (
    CostModel,
    Layout,
    Link,
    Planner,
    Schedule,
    get_planner,
    known_distributions,
    known_planners,
    lower_bound,
    plan_batch,
    preset,
    sample_lengths,
)
from tests.support.scheduling import PLAIN, clock, cost_of, problems

QUICK = ("refine", "default", "packed", "sorted", "skrull", "hdp")
Problem = tuple[list[int], Layout, CostModel]


def slots_of(schedule: Schedule) -> list[tuple[int, int, int, int]]:
    """Return length, micro-step, first rank and width of every sequence, sorted."""
    placement = schedule.placement
    rows = (schedule.length_K, placement.micro_K, placement.first_K, placement.width_K)
    return sorted(zip(*(row.tolist() for row in rows), strict=True))


def check_laws(schedule: Schedule, lengths: list[int], layout: Layout, cost: CostModel) -> None:
    schedule.check(lengths, layout, cost)
    assert schedule.seconds >= lower_bound(np.array(lengths), layout, cost) * (1 - 1e-9)
    plans = [schedule.micro_batches(rank) for rank in range(layout.ranks)]
    assert {len(plan) for plan in plans} == {schedule.micro_steps}
    assert any(not plan[-1].padding for plan in plans), "a micro-step that nobody needs"
    local = Counter(k for plan in plans for batch in plan for k in batch.local)
    shards = Counter(
        (shard.sequence, shard.ranks, batch.micro_step)
        for plan in plans
        for batch in plan
        for shard in batch.sharded
    )
    # Each shard is on exactly the ranks of its CP group, all of them in one group.
    for (_, ranks, _), count in shards.items():
        assert count == len(ranks)
        assert len({rank // layout.context for rank in ranks}) == 1
    whole = Counter(k for k, _, _ in shards)
    assert local + whole == Counter(range(len(lengths)))
    for rank, plan in enumerate(plans):
        assert max(batch.tokens for batch in plan) <= cost.memory_tokens
        assert schedule.memory_R[rank] == max(batch.tokens for batch in plan)
        for batch in plan:
            assert batch.padding == (batch.tokens == 0)
    assert schedule.violations(cost) == 0


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_quick_planners_keep_the_laws(name: str, problem: Problem) -> None:
    lengths, layout, cost = problem
    check_laws(plan_batch(lengths, layout, cost, name), lengths, layout, cost)


@pytest.mark.parametrize("name", ["flexsp", "milp"])
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=5).filter(lambda problem: problem[1].ranks <= 8))
def test_programs_keep_the_laws(name: str, problem: Problem) -> None:
    lengths, layout, cost = problem
    check_laws(plan_batch(lengths, layout, cost, name), lengths, layout, cost)


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=12), st.randoms(use_true_random=False))
def test_order_of_ids_does_not_matter_and_plans_repeat(
    name: str, problem: Problem, random: object
) -> None:
    lengths, layout, cost = problem
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined] # hypothesis gives a random.Random
    one = plan_batch(lengths, layout, cost, name)
    again = plan_batch(lengths, layout, cost, name)
    other = plan_batch([lengths[k] for k in order], layout, cost, name)
    assert one.document() == again.document()
    assert slots_of(one) == slots_of(other)
    assert one.seconds == other.seconds


@pytest.mark.parametrize("name", ["flexsp", "milp"])
def test_programs_repeat_whatever_the_order(name: str) -> None:
    lengths, layout, cost = [90, 70, 40, 40, 30, 10], Layout(1, 4), cost_of(memory_tokens=80)
    one = plan_batch(lengths, layout, cost, name)
    other = plan_batch(lengths[::-1], layout, cost, name)
    assert slots_of(one) == slots_of(other)


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=10))
def test_times_are_those_of_an_independent_clock(name: str, problem: Problem) -> None:
    lengths, layout, cost = problem
    schedule = plan_batch(lengths, layout, cost, name)
    assert schedule.seconds == pytest.approx(clock(schedule, cost), rel=1e-9)


@pytest.mark.parametrize("name", known_planners())
def test_a_sequence_too_long_for_a_group_is_refused_with_the_numbers(name: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        plan_batch([50, 401, 60, 500], Layout(2, 4), PLAIN, name)
    assert str(caught.value) == (
        "lengths[3] = 500: longer than the 4 x 100 = 400 tokens that a whole group of ranks can "
        "hold; 2 of 4 are. Raise layout.context or cost.memory_tokens, or cut the sequence."
    )
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", known_planners())
def test_the_longest_that_fits_is_planned(name: str) -> None:
    schedule = plan_batch([400], Layout(2, 4), PLAIN, name)
    (ranks,) = schedule.groups(0)
    assert len(ranks) == 4
    assert schedule.memory_R.tolist().count(100) == 4


@pytest.mark.parametrize("name", known_planners())
def test_an_empty_batch_has_an_empty_plan(name: str) -> None:
    schedule = plan_batch([], Layout(2, 4), PLAIN, name)
    assert schedule.micro_steps == 0
    assert schedule.seconds == 0
    assert schedule.micro_batches(0) == ()
    schedule.check([], Layout(2, 4), PLAIN)


@pytest.mark.parametrize("name", known_planners())
def test_one_rank_does_everything_itself(name: str) -> None:
    schedule = plan_batch([30, 100, 20], Layout(1, 1), PLAIN, name)
    done = [k for batch in schedule.micro_batches(0) for k in batch.local]
    assert sorted(done) == [0, 1, 2]
    assert not any(batch.sharded for batch in schedule.micro_batches(0))


@pytest.mark.parametrize("name", ["refine", "packed", "hdp", "skrull"])
@pytest.mark.parametrize("distribution", known_distributions())
def test_real_lengths_keep_the_laws(name: str, distribution: str) -> None:
    cost = preset("7b", "slow")
    layout = Layout(2, 8, widths=(2, 4))
    lengths = sample_lengths(distribution, 64, seed=3, longest=8 * cost.memory_tokens)
    schedule = plan_batch(lengths, layout, cost, name)
    check_laws(schedule, lengths.tolist(), layout, cost)


def test_default_takes_one_sequence_per_group_and_micro_step() -> None:
    schedule = plan_batch(range(1, 8), Layout(2, 2), PLAIN, "default")
    assert schedule.micro_steps == 4
    for micro in range(3):
        assert [len(ids) for ids in schedule.groups(micro).values()] == [1, 1]
    assert schedule.micro_batches(3)[3].padding


def test_sorted_runs_like_with_like() -> None:
    schedule = plan_batch([1, 20, 2, 21, 3, 22], Layout(2, 2), PLAIN, "sorted")
    together = [sorted(k for ids in schedule.groups(m).values() for k in ids) for m in range(3)]
    assert together == [[3, 5], [1, 4], [0, 2]]


def test_packed_needs_the_fewest_micro_batches() -> None:
    schedule = plan_batch([100] * 8, Layout(1, 4), PLAIN, "packed")
    assert schedule.micro_steps == 2
    assert (schedule.timing.tokens_MR == 100).all()


def test_hdp_gives_every_sequence_as_few_ranks_as_hold_it() -> None:
    layout = Layout(2, 4, widths=(2,), barrier="none")
    schedule = plan_batch([390, 150, 90, 20], layout, PLAIN, "hdp")
    assert schedule.placement.width_K.tolist() == [4, 2, 1, 1]


def test_flexsp_forms_cp_groups_of_several_sizes_side_by_side() -> None:
    layout = Layout(1, 4, widths=(2,))
    # One micro-batch is better than two, and a CP group of two better than one of four.
    cost = cost_of(base_s=1.0, edge_s=1e-2, links=(Link(2, 0.1, 1e-3), Link(4, 2.0, 0.05)))
    schedule = plan_batch([180, 90, 90], layout, cost, "flexsp")
    assert schedule.micro_steps == 1
    assert sorted(schedule.placement.width_K.tolist()) == [1, 1, 2]


@pytest.mark.parametrize("name", ["flexsp", "hdp", "refine"])
def test_planners_use_no_width_that_the_layout_forbids(name: str) -> None:
    cost = preset("0.5b", "slow")
    lengths = sample_lengths("chatqa2", 12, seed=0)
    schedule = plan_batch(lengths, Layout(2, 4), cost, name)
    assert set(schedule.placement.width_K.tolist()) <= {1, 4}


def test_the_facade_plans() -> None:
    schedule = raymix.plan_batch([10, 20], raymix.schedule.Layout(1, 2), PLAIN)
    assert schedule.planner == "refine"


def test_a_planner_of_ones_own_will_do() -> None:
    class Mine:
        def plan(self, lengths: ArrayLike, layout: Layout, cost: CostModel) -> Schedule:
            return plan_batch(lengths, layout, cost, "packed")

    assert plan_batch([10, 20], Layout(1, 2), PLAIN, Mine()).planner == "packed"
    assert isinstance(get_planner("refine"), Planner)


def test_unknown_planners_are_named() -> None:
    with pytest.raises(ScheduleError, match=r"Did you mean 'skrull'\?"):
        plan_batch([1], Layout(1), PLAIN, "skrul")


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 0], r"lengths\[1\] = 0: a sequence has at least one token"),
        ([-2], r"lengths\[0\] = -2"),
        ([1.5], "not a flat list of whole numbers"),
        ([[1, 2]], r"int64 of shape \(1, 2\)"),
        (["a"], "not a flat list of whole numbers"),
    ],
)
def test_what_is_no_length_is_refused(lengths: list[object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        plan_batch(lengths, Layout(1), PLAIN)  # type: ignore[arg-type] # is what is shown


def test_unsigned_lengths_as_a_corpus_stores_them_are_fine() -> None:
    lengths = np.array([10, 20, 30], dtype=np.uint32)
    assert plan_batch(lengths, Layout(1, 2), PLAIN).length_K.dtype == np.int64


def test_the_larger_memory_is_never_worse_for_packed() -> None:
    lengths = sample_lengths("longalign", 64, seed=5, longest=50_000)
    small = replace(preset("0.5b", "nvlink"), memory_tokens=13_000)
    large = replace(small, memory_tokens=52_000)
    layout = Layout(2, 8)
    fewer = plan_batch(lengths, layout, large, "packed").micro_steps
    assert fewer <= plan_batch(lengths, layout, small, "packed").micro_steps
