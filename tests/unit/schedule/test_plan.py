"""Schedules as a training loop reads them, how they check themselves, layouts, bounds."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raymix.errors import ScheduleError
from raymix.schedule import (
    CostModel,
    Layout,
    Link,
    Placement,
    Schedule,
    Shard,
    lower_bound,
    plan_batch,
)
from tests.support.scheduling import PLAIN, clock, cost_of, full_cost

LENGTHS = np.array([80, 40, 40, 30, 20])
# On two groups of two ranks: 80 sharded over the first, 40 and 40 on ranks 2 and 3, then 30 on
# rank 0 in a second micro-step; 20 sits beside the shard on rank 1.
PLACES = ([0, 0, 0, 1, 0], [0, 2, 3, 0, 1], [2, 1, 1, 1, 1])


def placement(micro: list[int], first: list[int], width: list[int]) -> Placement:
    return Placement(*(np.array(values, dtype=np.int64) for values in (micro, first, width)))


def schedule(layout: Layout | None = None, cost: CostModel | None = None) -> Schedule:
    layout = layout or Layout(2, 2)
    return Schedule.build("by hand", LENGTHS, placement(*PLACES), layout, cost or PLAIN)


def test_micro_batches_say_what_each_rank_holds() -> None:
    plans = [schedule().micro_batches(rank) for rank in range(4)]
    shard = Shard(0, (0, 1))
    assert [batch.local for plan in plans for batch in plan] == [
        (), (3,), (4,), (), (1,), (), (2,), (),
    ]  # fmt: skip
    assert [batch.sharded for plan in plans for batch in plan] == [
        (shard,), (), (shard,), (), (), (), (), (),
    ]  # fmt: skip
    assert [batch.tokens for plan in plans for batch in plan] == [40, 30, 60, 0, 40, 0, 40, 0]
    assert [batch.padding for plan in plans for batch in plan] == [
        False, False, False, True, False, True, False, True,
    ]  # fmt: skip


def test_sharded_sequences_by_cp_group() -> None:
    plan = schedule()
    assert plan.groups(0) == {(0, 1): (0,)}
    assert plan.groups(1) == {}


def test_times_by_hand() -> None:
    """Eq. (1) for one rank: max(gather, local attention) + sharded attention + linear."""
    plan = schedule(cost=full_cost())
    gather = 0.1 + 1e-3 * 80
    local = 1e-4 * 400 + 2e-3 * 20 + 0.01
    sharded = 1e-4 * 6400 / 2 + 2e-3 * 80 + 0.01
    linear = 0.05 + 1e-2 * 60
    assert plan.timing.busy_MR[0, 1] == pytest.approx(max(gather, local) + sharded + linear)
    assert plan.timing.gather_MR[0].tolist() == pytest.approx([gather, gather, 0, 0])
    assert plan.timing.gathered_MR[0].tolist() == [80, 80, 0, 0]
    assert plan.timing.busy_MR[1, 1:].tolist() == [0, 0, 0]
    assert plan.seconds == pytest.approx(clock(plan, full_cost()))


@pytest.mark.parametrize("barrier", ["group", "all", "none"])
def test_who_waits_for_whom(barrier: Any) -> None:
    plan = schedule(Layout(2, 2, barrier=barrier), full_cost())
    busy, start = plan.timing.busy_MR, plan.timing.start_MR
    first, second = busy[0, :2].max(), busy[0, 2:].max()
    expected = {
        "group": [first, first, second, second],
        "all": [max(first, second)] * 4,
        # 40 and 40 are alike; the two that share 80 wait for each other all the same.
        "none": [first, first, busy[0, 2], busy[0, 3]],
    }[barrier]
    assert start[1].tolist() == pytest.approx(expected)
    assert plan.seconds == pytest.approx((start[1] + busy[1]).max())


def test_a_schedule_knows_its_memory() -> None:
    plan = schedule()
    assert plan.memory_R.tolist() == [40, 60, 40, 40]
    assert plan.violations(PLAIN) == 0
    assert plan.violations(cost_of(memory_tokens=40)) == 1
    assert plan.violations(cost_of(memory_tokens=39)) == 4


def test_a_whole_schedule_passes_its_check() -> None:
    schedule().check(LENGTHS, Layout(2, 2), PLAIN)


def moved(**changes: list[int]) -> Callable[[], Schedule]:
    names = ("micro", "first", "width")
    places = {name: changes.get(name, list(old)) for name, old in zip(names, PLACES, strict=True)}

    def make() -> Schedule:
        good = schedule()
        return replace(good, placement=placement(places["micro"], places["first"], places["width"]))

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (moved(width=[3, 1, 1, 1, 1]), r"schedule\.placement\[0\] = \(0, 0, 3\): not a slot"),
        (moved(first=[1, 2, 3, 0, 1]), r"\(0, 1, 2\): not a slot of the layout"),
        (moved(first=[0, 4, 3, 0, 1]), r"schedule\.placement\[1\] = \(0, 4, 1\)"),
        (moved(first=[0, 2, -1, 0, 1]), r"schedule\.placement\[2\]"),
        (moved(micro=[-1, 0, 0, 1, 0]), r"schedule\.placement\[0\] = \(-1"),
        (moved(micro=[0, 0, 0]), "not one slot per sequence"),
        (moved(first=[0, 3, 3, 0, 1]), "or other tokens per rank"),
    ],
)
def test_a_broken_schedule_says_where(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make().check(LENGTHS, Layout(2, 2), PLAIN)


def test_a_schedule_is_for_its_own_lengths_layout_and_memory() -> None:
    for lengths, layout in ((LENGTHS[::-1], Layout(2, 2)), (LENGTHS, Layout(1, 4))):
        with pytest.raises(ScheduleError, match="made for other lengths"):
            schedule().check(lengths, layout, PLAIN)
    with pytest.raises(ScheduleError, match=r"60: 1 micro-batches exceed the 50 tokens"):
        schedule().check(LENGTHS, Layout(2, 2), cost_of(memory_tokens=50))


def test_times_of_another_cost_model_are_noticed() -> None:
    with pytest.raises(ScheduleError, match=r"schedule\.seconds"):
        schedule().check(LENGTHS, Layout(2, 2), cost_of(linear_s=2e-3))


def test_there_are_no_other_ranks() -> None:
    with pytest.raises(ScheduleError, match=r"rank = 4: the layout has ranks 0 to 3"):
        schedule().micro_batches(4)


def test_a_schedule_travels() -> None:
    plan = plan_batch(LENGTHS, Layout(2, 2), PLAIN)
    again = pickle.loads(pickle.dumps(plan))
    assert again.document() == plan.document()
    again.check(LENGTHS, Layout(2, 2), PLAIN)
    document = json.loads(json.dumps(plan.document()))
    assert len(document["micro_step"]) == LENGTHS.size
    assert len(document["tokens"]) == plan.micro_steps


def test_slots_of_a_group() -> None:
    slots = Layout(2, 4, widths=(2,)).slots
    assert slots.width_T.tolist() == [1, 1, 1, 1, 2, 2, 4]
    assert slots.first_T.tolist() == [0, 1, 2, 3, 0, 2, 0]
    assert slots.covers_TN.sum(axis=1).tolist() == slots.width_T.tolist()


def test_widths_always_hold_one_rank_and_the_group() -> None:
    assert Layout(1, 8).widths == (1, 8)
    assert Layout(1, 8, widths=(4, 2)).widths == (1, 2, 4, 8)
    assert Layout(3, 1).widths == (1,)
    assert Layout(3, 2).ranks == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, r"layout\.groups = 0: not a whole number >= 1"),
        ({"context": 1.5}, r"layout\.context = 1\.5"),
        ({"groups": True}, r"layout\.groups = True"),
        ({"widths": (3,)}, "3 does not divide the 4 ranks of a group"),
        ({"barrier": "groups"}, r"Known: group, all, none\. Did you mean 'group'\?"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Layout(**({"groups": 2, "context": 4} | changes))


def test_the_bound_is_met_by_perfect_balance() -> None:
    cost = cost_of(base_s=0.5)
    layout = Layout(2, 2)
    lengths = np.array([50] * 4)
    assert lower_bound(lengths, layout, cost) <= plan_batch(lengths, layout, cost).seconds
    free = PLAIN
    alone = plan_batch(lengths, layout, free)
    assert alone.seconds == pytest.approx(lower_bound(lengths, layout, free))


def test_the_bound_of_one_long_sequence_is_its_best_cp_group() -> None:
    cost = replace(PLAIN, links=(Link(2, 0.0, 1.0),))
    # Whole 0.1 + 0.01 s; sharded it would have to be gathered for 100 s.
    assert lower_bound(np.array([100]), Layout(1, 2), cost) == pytest.approx(0.11)
    assert lower_bound(np.array([200]), Layout(1, 2), cost) == pytest.approx(200 + 0.02 + 0.1)
    assert lower_bound(np.zeros(0, dtype=np.int64), Layout(1, 2), cost) == 0
