"""The plan of packed rows: chunks, resumption, changes of weights, order inside a step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.errors import CorpusError
from raymix.sampling import (
    MixtureEntry,
    MixtureLog,
    PackedPlanner,
    PlanChunk,
    batch_hash,
    epochs_implied,
    fixed_point,
    realized_error_bound,
    realized_shares,
)
from raymix.sampling.shares import Ints

Change = tuple[int, tuple[float, ...]]


def log_of(*changes: Change) -> MixtureLog:
    log = MixtureLog(tuple(f"d{at}" for at in range(len(changes[0][1]))))
    for version, (step, weights) in enumerate(changes):
        log.append(MixtureEntry(version, step, weights, "test"))
    return log


def planner(log: MixtureLog, rows: int = 16, limit_D: Ints | None = None) -> PackedPlanner:
    return PackedPlanner(
        n_domains=len(log.domains), rows_per_step=rows, seed=11, log=log, limit_D=limit_D
    )


def hashes(chunk: PlanChunk) -> list[str]:
    steps = range(chunk.first_step, chunk.first_step + chunk.n_steps)
    return [chunk.batch_hash(step) for step in steps]


@st.composite
def logs(draw: st.DrawFn) -> MixtureLog:
    n_domains = draw(st.sampled_from([1, 2, 5, 60]))
    share = st.floats(0, 1, allow_subnormal=False)
    shares = st.lists(share, min_size=n_domains, max_size=n_domains)
    steps = [0, *sorted(draw(st.sets(st.integers(1, 30), max_size=4)))]
    weights = [draw(shares.filter(lambda w: sum(w) > 0)) for _ in steps]
    return log_of(*((step, tuple(w)) for step, w in zip(steps, weights, strict=True)))


@settings(max_examples=50)
@given(logs(), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 20))
def test_in_chunks_one_by_one_or_resumed_the_plan_is_the_same(
    log: MixtureLog, sizes: list[int], rows: int
) -> None:
    total = sum(sizes)
    whole = planner(log, rows).plan(total)
    in_chunks, expected = planner(log, rows), hashes(whole)
    for size in sizes:
        state = json.loads(json.dumps(in_chunks.state_dict()))
        resumed = planner(log, rows)
        resumed.load_state_dict(state)
        first = in_chunks.step
        assert hashes(resumed.plan(size)) == expected[first : first + size]
        chunk = in_chunks.plan(size)
        assert hashes(chunk) == expected[first : first + size]
        assert chunk.version_S.tolist() == whole.version_S[first : first + size].tolist()
        assert resumed.state_dict() == in_chunks.state_dict()
        assert in_chunks.state_at(chunk, first) == state
        assert in_chunks.step == first + size


@settings(max_examples=50)
@given(logs(), st.integers(1, 20))
def test_every_step_holds_the_next_samples_of_each_domain_and_nothing_else(
    log: MixtureLog, rows: int
) -> None:
    chunk = planner(log, rows).plan(40)
    seen_D = np.zeros(len(log.domains), dtype=np.int64)
    for at in range(40):
        assert chunk.version_S[at] == log.at(at).version
        for domain in range(seen_D.size):
            indices = np.sort(chunk.index_SB[at][chunk.domain_SB[at] == domain])
            assert indices.size == chunk.counts_SD[at, domain]
            assert (indices == seen_D[domain] + np.arange(indices.size)).all()
            assert log.at(at).weights[domain] > 0 or not indices.size
        seen_D += chunk.counts_SD[at]


@settings(max_examples=50)
@given(logs(), st.integers(1, 20))
def test_realized_shares_follow_the_asked_ones_at_every_step(log: MixtureLog, rows: int) -> None:
    chunk = planner(log, rows).plan(40)
    requested_SD = np.array([fixed_point(log.at(at).weights) for at in range(40)]) / 2.0**40 * rows
    trailing_SD = requested_SD.cumsum(axis=0) - chunk.counts_SD.cumsum(axis=0)
    bound = realized_error_bound(len(log.domains), same_domains=False)
    assert np.abs(trailing_SD).max() <= bound + 1e-6


def test_a_new_entry_inside_a_chunk_is_planned_again_from_its_step() -> None:
    log = log_of((0, (0.5, 0.5)))
    ahead = planner(log)
    chunk = ahead.plan(64)
    log.append(MixtureEntry(1, 20, (0.9, 0.1), "asked"))
    ahead.rewind(chunk, 20)
    again = ahead.plan(44)
    expected = hashes(planner(log).plan(64))
    assert hashes(chunk)[:20] + hashes(again) == expected
    assert hashes(chunk)[20:] != expected[20:]
    assert set(again.version_S.tolist()) == {1}
    with pytest.raises(ValueError, match="not in the chunk"):
        ahead.rewind(again, 19)


def test_a_switch_holds_from_its_first_step_on() -> None:
    chunk = planner(log_of((0, (0.5, 0.5)), (10_000, (0.9, 0.1))), rows=10).plan(10_100)
    assert (chunk.counts_SD[:10_000] == 5).all()
    assert (np.abs(chunk.counts_SD[10_000:] - [9, 1]) <= 1).all()


def test_rows_of_a_domain_are_spread_over_the_batch_and_steps_differ() -> None:
    chunk = planner(log_of((0, (0.5, 0.5)))).plan(500)
    places = np.flatnonzero(chunk.domain_SB.ravel() == 0) % 16
    counts = np.bincount(places, minlength=16)
    assert np.abs(counts - 250).max() < 60
    assert len({row.tobytes() for row in chunk.domain_SB}) > 450


def test_the_seed_changes_the_order_but_not_the_counts() -> None:
    log = log_of((0, (0.7, 0.2, 0.1)))
    one = PackedPlanner(n_domains=3, rows_per_step=16, seed=1, log=log).plan(5)
    two = PackedPlanner(n_domains=3, rows_per_step=16, seed=2, log=log).plan(5)
    assert (one.counts_SD == two.counts_SD).all()
    assert hashes(one) != hashes(two)


def test_limits_shorten_the_last_chunk_and_the_next_call_says_why() -> None:
    limited = planner(log_of((0, (0.5, 0.5))), rows=4, limit_D=np.array([3, 9]))
    chunk = limited.plan(64)
    assert chunk.n_steps == 3
    assert chunk.counts_SD.sum(axis=0).tolist() == [3, 9]
    with pytest.raises(CorpusError, match=r"step = 3: .*d0, d1"):
        limited.plan(64)
    assert limited.step == 3


def test_limits_across_a_change_of_weights_keep_what_was_planned() -> None:
    log = log_of((0, (1.0, 0.0)), (2, (0.0, 1.0)))
    limited = planner(log, rows=4, limit_D=np.array([8, 4]))
    assert limited.plan(10).counts_SD.tolist() == [[4, 0], [4, 0], [0, 4]]


def test_a_state_of_other_domains_is_refused() -> None:
    with pytest.raises(ValueError, match="2 domains for 3"):
        planner(log_of((0, (1, 1, 1)))).load_state_dict(planner(log_of((0, (1, 1)))).state_dict())


def test_no_steps_are_an_empty_chunk() -> None:
    chunk = planner(log_of((0, (1, 1)))).plan(0)
    assert chunk.n_steps == 0
    assert chunk.domain_SB.shape == (0, 16)


def test_the_state_is_small_and_exact_at_ten_thousand_domains() -> None:
    rng = np.random.default_rng(0)
    log = log_of((0, tuple(rng.dirichlet(np.full(10_000, 0.3)).tolist())))
    large = planner(log, rows=1024)
    large.plan(40)
    text = json.dumps(large.state_dict())
    assert len(text) < 200_000
    resumed = planner(log, rows=1024)
    resumed.load_state_dict(json.loads(text))
    assert hashes(resumed.plan(2)) == hashes(large.plan(2))


def test_the_plan_is_frozen() -> None:
    # A change of this hash changes the batches of every run: it needs a new format.
    chunk = planner(log_of((0, (0.5, 0.3, 0.2)), (7, (0.1, 0.9, 0.0)))).plan(20)
    assert batch_hash(chunk.domain_SB.ravel(), chunk.index_SB.ravel()) == "f4fbb7e80d14516f"


def test_a_batch_hash_depends_on_order_and_not_on_types() -> None:
    domains, indices = np.array([0, 1, 1]), np.array([5, 0, 1])
    name = batch_hash(domains, indices)
    assert name == batch_hash(domains.astype(np.int32), indices.tolist())
    assert name == "3fbad1521727587c"
    assert name != batch_hash(domains[::-1], indices[::-1])
    assert name != batch_hash(indices, domains)


def test_helpers_of_reports() -> None:
    assert realized_shares([3, 1]).tolist() == [0.75, 0.25]
    assert realized_shares([0, 0]).tolist() == [0, 0]
    epochs_D = epochs_implied([0.5, 0.5, 0.0, 0.0], [100, 1000, 10, 0], 400)
    assert epochs_D.tolist() == [2, 0.2, 0, 0]
    assert epochs_implied([1.0], [0], 400).tolist() == [np.inf]
