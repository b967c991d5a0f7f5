"""The plan of whole documents: token budgets, bounds in tokens, resumption, packing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import CorpusError
from raymix.sampling import (
    CorpusOrder,
    DocumentPlanner,
    DocumentStep,
    DomainGeometry,
    MixtureEntry,
    MixtureLog,
    batch_hash,
)
from raymix.sampling.shares import Ints, restricted

GROUP = 8


def planner(
    lengths: list[list[int]],
    changes: list[tuple[int, tuple[float, ...]]],
    *,
    budget: int,
    longest: int = 1000,
    limit_D: Ints | None = None,
) -> DocumentPlanner:
    names = tuple(f"d{at}" for at in range(len(lengths)))
    log = MixtureLog(names)
    for version, (step, weights) in enumerate(changes):
        log.append(MixtureEntry(version, step, weights, "test"))
    shapes = [
        DomainGeometry(n, len(domain_lengths), GROUP)
        for n, domain_lengths in zip(names, lengths, strict=True)
    ]
    return DocumentPlanner(
        order=CorpusOrder(shapes, seed=2, window=2),
        lengths=[np.array(domain_lengths, dtype=np.uint32) for domain_lengths in lengths],
        sequence_length=longest,
        tokens_per_step=budget,
        log=log,
        limit_D=limit_D,
    )


def hashes(steps: list[DocumentStep]) -> list[str]:
    return [batch_hash(step.domain_N, step.index_N) for step in steps]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, tuple[float, ...]]], int]:
    n_domains = draw(st.integers(1, 6))
    domain_lengths = st.lists(st.integers(1, 300), min_size=1, max_size=20)
    lengths = [draw(domain_lengths) for _ in range(n_domains)]
    share = st.floats(0, 1, allow_subnormal=False)
    shares = st.lists(share, min_size=n_domains, max_size=n_domains).filter(lambda w: sum(w) > 0)
    steps = [0, *sorted(draw(st.sets(st.integers(1, 9), max_size=3)))]
    return lengths, [(step, tuple(draw(shares))) for step in steps], draw(st.integers(1, 900))


@given(cases(), st.integers(50, 400))
def test_each_step_meets_its_budget_and_stops_there(
    case: tuple[list[list[int]], list[tuple[int, tuple[float, ...]]], int], longest: int
) -> None:
    lengths, changes, budget = case
    seen = [0] * len(lengths)
    for number, step in enumerate(planner(*case[:2], budget=budget, longest=longest).plan(12)):
        assert step.step == number
        assert step.length_N.sum() >= budget > step.length_N[:-1].sum()
        weights = next(w for first, w in reversed(changes) if first <= number)
        for domain, index, document, length in zip(
            step.domain_N, step.index_N, step.document_N, step.length_N, strict=True
        ):
            assert index == seen[domain]
            assert weights[domain] > 0
            assert length == min(lengths[domain][document], longest)
            seen[domain] += 1


@given(cases())
def test_carries_sum_to_zero_and_stay_within_the_bound(
    case: tuple[list[list[int]], list[tuple[int, tuple[float, ...]]], int],
) -> None:
    lengths, changes, budget = case
    plan = planner(lengths, changes, budget=budget)
    longest, n_domains = max(map(max, lengths)), len(lengths)
    always = all(weight > 0 for _, weights in changes for weight in weights)
    upper = longest * sum(1 / k for k in range(1, n_domains)) if always else longest * n_domains
    for _ in range(12):
        plan.plan(1)
        carry_D = plan.carry_D / 2.0**plan.bits
        assert plan.carry_D.sum() == 0
        assert carry_D.max() <= upper
        assert carry_D.min() > -longest if always else carry_D.min() >= -longest * n_domains


@given(cases(), st.integers(0, 11))
def test_resumed_or_not_the_plan_is_the_same(
    case: tuple[list[list[int]], list[tuple[int, tuple[float, ...]]], int], cut: int
) -> None:
    lengths, changes, budget = case
    whole = hashes(planner(lengths, changes, budget=budget).plan(12))
    first = planner(lengths, changes, budget=budget)
    first.plan(cut)
    resumed = planner(lengths, changes, budget=budget)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert hashes(resumed.plan(12 - cut)) == whole[cut:]


@pytest.mark.parametrize("n_domains", [2, 3, 8])
def test_an_adversary_comes_near_the_bound_in_tokens_and_never_past_it(n_domains: int) -> None:
    length = 100
    start = (0, (1.0,) * n_domains)
    plan = planner([[length] * 9] * n_domains, [start], budget=1)
    bound = length * sum(1 / k for k in range(1, n_domains))
    for step in range(1, n_domains):
        plan.plan(1)
        assert plan.carry_D.max() / 2.0**plan.bits <= bound
        untaken = np.where(plan.count_D == 0, 1.0, 1e-6)
        plan.log.append(MixtureEntry(step, step, tuple(untaken / untaken.sum()), "test"))
    assert plan.carry_D.max() / 2.0**plan.bits >= bound - length


def test_token_shares_come_out_although_documents_differ_in_length() -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, high, 500).tolist() for high in (20, 200, 1000)]
    steps = planner(lengths, [(0, (0.5, 0.3, 0.2))], budget=5000).plan(100)
    domains = np.concatenate([step.domain_N for step in steps])
    tokens_D = np.bincount(domains, np.concatenate([step.length_N for step in steps]))
    assert np.abs(tokens_D - tokens_D.sum() * np.array([0.5, 0.3, 0.2])).max() <= 1500


def test_an_epoch_reads_every_document_once() -> None:
    plan = planner([[5] * 37], [(0, (1.0,))], budget=37 * 5)
    first, second = plan.plan(2)
    assert sorted(first.document_N.tolist()) == list(range(37))
    assert sorted(second.document_N.tolist()) == list(range(37))
    assert first.document_N.tolist() != second.document_N.tolist()


def test_many_domains_need_fewer_bits_and_are_planned_alike() -> None:
    n_domains = 300
    lengths = [[7, 900, 31]] * n_domains
    plan = planner(lengths, [(0, (1 / n_domains,) * n_domains)], budget=2000, longest=1 << 20)
    steps = plan.plan(30)
    assert plan.bits < 40
    assert len(hashes(steps)) == 30
    assert np.abs(plan.carry_D).max() / 2.0**plan.bits <= 900 * 7


def test_at_its_limit_a_domain_hands_its_share_to_the_others() -> None:
    plan = planner(
        [[10] * 50] * 3, [(0, (0.5, 0.25, 0.25))], budget=40, limit_D=np.array([5, 50, 50])
    )
    steps = plan.plan(10)
    counts = np.array([np.bincount(step.domain_N, minlength=3) for step in steps])
    assert counts[:, 0].sum() == 5
    assert abs(counts[:, 1].sum() - counts[:, 2].sum()) <= 1
    assert (counts[4:, 0] == 0).all()


def test_used_up_documents_are_an_error_that_changes_nothing() -> None:
    plan = planner([[10] * 50], [(0, (1.0,))], budget=40, limit_D=np.array([6]))
    plan.plan(1)
    before = plan.state_dict()
    with pytest.raises(CorpusError, match=r"step = 1: .*limits.*max_epochs"):
        plan.plan(1)
    assert plan.state_dict() == before


def test_a_state_of_other_domains_is_refused() -> None:
    two = planner([[1], [1]], [(0, (1.0, 1.0))], budget=1)
    with pytest.raises(ValueError, match="2 domains for 1"):
        planner([[1]], [(0, (1.0,))], budget=1).load_state_dict(two.state_dict())


def test_restricted_shares_of_nobody_are_nothing() -> None:
    assert restricted(np.array([4, 0]), np.array([False, True])).tolist() == [0, 0]
