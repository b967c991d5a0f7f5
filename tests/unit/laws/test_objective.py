"""Objectives: what is refused, in which words; the limits that are left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import LawError
from raymix.laws import Objective, Region, feasible

DOMAINS, TARGETS = ("web", "books", "code"), ("web", "math")

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"caps": {"bok": 0.3}},
        "objective.caps.bok = 0.3: the law knows no such domain. Did you mean 'books'? "
        "Known: web, books, code.",
    ),
    (
        {"weights": {"maths": 1}},
        "objective.weights.maths = 1: the law knows no such target. Did you mean 'math'? "
        "Known: web, math.",
    ),
    (
        {"caps": {"web": 1.5}},
        "objective.caps.web = 1.5: not allowed. Allowed: a share from 0 to 1.",
    ),
    (
        {"floors": {"web": -0.1}},
        "objective.floors.web = -0.1: not allowed. Allowed: a share from 0 to 1.",
    ),
    (
        {"floors": {"web": 0.5}, "caps": {"web": 0.3}},
        "objective.floors.web = 0.5: above its cap 0.3. Lower the floor or raise the cap.",
    ),
    (
        {
            "floors": {"web": 0.5},
            "max_epochs": 4,
            "total_tokens": 1e9,
            "available_tokens": {"web": 1e8},
        },
        "objective.floors.web = 0.5: above its cap 0.4, which max_epochs implies. "
        "Lower the floor or raise the cap.",
    ),
    (
        {"floors": {"web": 0.6, "code": 0.6}},
        "objective.floors = 1.2: the floors sum to more than 1. Lower them.",
    ),
    (
        {"caps": {"web": 0.3, "books": 0.3, "code": 0.3}},
        "objective.caps = 0.9: all caps together allow less than 1. Raise the caps.",
    ),
    (
        {
            "max_epochs": 1,
            "total_tokens": 100,
            "available_tokens": {"web": 20, "books": 20, "code": 20},
        },
        "objective.caps = 0.6: all caps together allow less than 1. "
        "Raise max_epochs or caps, or train on fewer tokens.",
    ),
    (
        {"max_epochs": 4},
        "objective.max_epochs = 4: goes with total_tokens and available_tokens, not given. "
        "Give all three or none of them.",
    ),
    (
        {"max_epochs": 0, "total_tokens": 1, "available_tokens": {"web": 1}},
        "objective.max_epochs = 0: not allowed. Allowed: a finite number above 0.",
    ),
    (
        {"prior": {"web": 0.5}},
        "objective.prior = 0.5: the shares do not sum to 1. Name every domain that has one.",
    ),
    (
        {"prior": {"web": 0.5, "books": 0.5}, "kl": 0.1},
        "objective.prior.code = 0.0: any share of it would be infinitely far from a prior of 0. "
        "Give it a prior above 0, or a cap of 0 (code=0).",
    ),
    ({"kl": 0.1}, "objective.kl = 0.1: there is no prior to stay near to. Give a prior."),
    ({"kl": -1}, "objective.kl = -1: not a weight. Allowed: a number of at least 0."),
    (
        {"weights": {"web": -1, "math": 1}},
        "objective.weights.web = -1: not allowed. Allowed: a finite number of at least 0.",
    ),
    (
        {"weights": {"web": 0}},
        "objective.weights = {'web': 0}: no target has a weight. Give one at least above 0.",
    ),
    ({"horizon": 0}, "objective.horizon = 0: not a number of steps. Allowed: above 0."),
    (
        {"horizon": float("nan")},
        "objective.horizon = nan: not a number of steps. Allowed: above 0.",
    ),
]


@pytest.mark.parametrize(("given_", "message"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_cannot_be_is_refused_in_these_words(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(LawError) as caught:
        feasible(Objective(**given_), DOMAINS, TARGETS)
    assert caught.value.problems == (message,)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(LawError) as caught:
        feasible(Objective(caps={"x": 2}, horizon=-1, kl=-1), DOMAINS, TARGETS)
    assert len(caught.value.problems) == 3


def test_epochs_become_caps() -> None:
    objective = Objective(
        caps={"books": 0.1, "code": 0.9},
        max_epochs=4,
        total_tokens=1e9,
        available_tokens={"books": 1e8, "code": 1e8},
    )
    np.testing.assert_allclose(
        feasible(objective, DOMAINS, TARGETS).region.high_A, [1, 0.1, 0.4], rtol=1e-15
    )


def test_weights_have_their_defaults() -> None:
    def weights(**given: Any) -> list[float]:
        return feasible(Objective(**given), DOMAINS, TARGETS).weight_V.tolist()

    assert weights() == [0.5, 0.5]
    assert weights(minimax=True) == [1, 1]
    assert weights(weights={"math": 2}) == [0, 2]


def test_a_prior_of_zero_is_fine_where_nothing_is_allowed() -> None:
    prior = {"web": 0.5, "books": 0.5}
    problem = feasible(Objective(prior=prior, kl=0.1, caps={"code": 0}), DOMAINS, TARGETS)
    assert problem.divergence(np.array([0.5, 0.5, 0])) == 0
    assert problem.divergence(np.array([1.0, 0, 0])) == pytest.approx(0.1 * np.log(2))


@st.composite
def regions(draw: st.DrawFn) -> Region:
    size = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = rng.dirichlet(np.ones(size)) * rng.uniform(0, 1) * (rng.random(size) < 0.5)
    high = low + (1 - low) * rng.random(size) ** 2
    lacking = max(0.0, 1 - high.sum())
    return Region(low_A=low, high_A=np.minimum(1, high + lacking))


@given(region=regions(), seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 200))
def test_the_nearest_shares_are_a_clipped_multiple(
    region: Region, seed: int, spread: float
) -> None:
    log_A = np.random.default_rng(seed).normal(0, spread, region.low_A.size)
    share_A = region.project(log_A)
    assert share_A.sum() == pytest.approx(1, abs=1e-12)
    assert (share_A >= region.low_A).all()
    assert (share_A <= region.high_A).all()
    free = (share_A > region.low_A) & (share_A < region.high_A) & (share_A > 1e-200)
    if not free.any():
        return
    level = np.log(share_A[free]) - log_A[free]
    assert np.ptp(level) < 1e-9 * (1 + spread)
    with np.errstate(divide="ignore"):
        # A share may also be 0 because it is too small for a float.
        at_low = (share_A == region.low_A) & (region.high_A > region.low_A) & (share_A > 0)
        at_high = (share_A == region.high_A) & (region.high_A > region.low_A)
        slack = 1e-9 * (1 + spread)
        assert (np.log(region.low_A) - log_A >= level.mean() - slack)[at_low].all()
        assert (np.log(region.high_A) - log_A <= level.mean() + slack)[at_high].all()


@given(region=regions(), seed=st.integers(0, 2**32 - 1))
def test_the_cheapest_shares_beat_random_ones(region: Region, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=region.low_A.size)
    best = region.vertex(cost)
    assert best.sum() == pytest.approx(1, abs=1e-12)
    assert (best >= region.low_A - 1e-15).all()
    assert (best <= region.high_A + 1e-15).all()
    for _ in range(5):
        assert cost @ best <= cost @ region.project(rng.normal(0, 2, cost.size)) + 1e-12
