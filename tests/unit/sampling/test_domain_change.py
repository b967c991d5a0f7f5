"""A planner's state for other domains: what stays goes on, whatever comes and goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.sampling import MixtureEntry, MixtureLog, PackedPlanner, change_domains, fixed_point
from raymix.sampling.planner_state import dump_state, load_state

names = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@given(before=names, after=names, seed=st.integers(0, 99), shift=st.integers(-3, 3))
def test_what_stays_keeps_its_carry_and_count(
    before: list[str], after: list[str], seed: int, shift: int
) -> None:
    generator = np.random.default_rng(seed)
    carry_D, count_D = generator.integers(-(2**40), 2**40, (2, len(before)))
    state = change_domains(dump_state(7, carry_D, count_D), before, after, shift=shift)
    step, new_carry_D, new_count_D = load_state(state, len(after))
    assert step == 7
    for at, name in enumerate(after):
        carry = int(carry_D[before.index(name)]) if name in before else 0
        count = int(count_D[before.index(name)]) if name in before else 0
        assert (new_carry_D[at], new_count_D[at]) == (carry * 2**shift // 1, count)


def test_a_state_of_other_domains_is_refused() -> None:
    with pytest.raises(ValueError, match="a state of 2 domains for 3"):
        change_domains(dump_state(0, *np.zeros((2, 2), np.int64)), "abc", "ab")


@given(seed=st.integers(0, 999), change=st.integers(1, 30), rows=st.integers(1, 9))
def test_what_is_read_stays_within_the_bound_of_domains_that_come_and_go(
    seed: int, change: int, rows: int
) -> None:
    generator = np.random.default_rng(seed)
    before, after = ("a", "b", "c"), ("d", "a", "c", "e")
    shares = [tuple(generator.dirichlet(np.ones(len(part)))) for part in (before, after)]
    requested = dict.fromkeys("abcde", 0.0)
    read = dict.fromkeys("abcde", 0)
    state = None
    for domains, share_D, first, steps in (
        (before, shares[0], 0, change),
        (after, shares[1], change, 40),
    ):
        log = MixtureLog(domains, [MixtureEntry(0, first, share_D, "static")])
        planner = PackedPlanner(n_domains=len(domains), rows_per_step=rows, seed=0, log=log)
        if state is not None:
            planner.load_state_dict(change_domains(state, before, after))
        q_D = fixed_point(share_D) / 2**40
        for counts_D in planner.plan(steps).counts_SD:
            for at, name in enumerate(domains):
                requested[name] += rows * q_D[at]
                read[name] += int(counts_D[at])
            assert all(abs(read[name] - requested[name]) <= 2 + 1e-6 for name in "abcde")
        state = planner.state_dict()
