"""The order of samples: a bijection in every epoch, local in windows, and as good as random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import chdtrc

from raymix.errors import CorpusError
from raymix.sampling import CorpusOrder, DomainGeometry, DomainOrder, domain_key
from raymix.sampling._bits import Radix, permute
from raymix.sampling.order import step_order
from raymix.sampling.shares import Ints

geometries = st.builds(
    DomainGeometry,
    name=st.text(min_size=1, max_size=8),
    units=st.integers(1, 700),
    group_units=st.integers(1, 90),
)
seeds = st.integers(0, 2**63 - 1)
windows = st.integers(1, 12) | st.just(65_536)


def p_value(seen: Any, expected: Any) -> float:
    """Return how likely counts as far from the expected ones are (Pearson's chi-square)."""
    return float(chdtrc(len(seen) - 1, ((seen - expected) ** 2 / expected).sum()))


def samples(order: DomainOrder, n: Ints) -> Ints:
    """Position on disk of the n-th samples."""
    _, group, unit = order.locate(n)
    return group * order.geometry.group_units + unit


@given(geometries, seeds, windows, st.integers(0, 1000))
def test_every_epoch_visits_every_sample_once(
    geometry: DomainGeometry, seed: int, window: int, epoch: int
) -> None:
    order = DomainOrder(geometry, seed=seed, window=window)
    n = np.arange(epoch * geometry.units, (epoch + 1) * geometry.units)
    epochs, groups, units = order.locate(n)
    assert (epochs == epoch).all()
    assert (units < geometry.group_units).all()
    assert sorted(groups * geometry.group_units + units) == list(range(geometry.units))


@given(geometries, seeds, st.integers(1, 12))
def test_a_window_reads_only_its_own_groups_and_the_short_group_comes_last(
    geometry: DomainGeometry, seed: int, window: int
) -> None:
    order = DomainOrder(geometry, seed=seed, window=window)
    _, groups, _ = order.locate(np.arange(geometry.units))
    size = window * geometry.group_units
    parts = [set(groups[at : at + size].tolist()) for at in range(0, geometry.units, size)]
    assert all(len(part) <= window for part in parts)
    assert sum(map(len, parts)) == len(set(groups.tolist()))
    if geometry.units % geometry.group_units:
        assert geometry.units // geometry.group_units in parts[-1]


@given(
    st.lists(geometries, min_size=1, max_size=5),
    seeds,
    windows,
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5000)), max_size=60),
)
def test_together_or_apart_in_any_order_the_answer_is_the_same(
    several: list[DomainGeometry], seed: int, window: int, requests: list[tuple[int, int]]
) -> None:
    orders = CorpusOrder(several, seed=seed, window=window)
    domain = np.array([at % len(several) for at, _ in requests], dtype=np.int64)
    n = np.array([n for _, n in requests], dtype=np.int64)
    together = np.stack(orders.locate(domain, n))
    for at, geometry in enumerate(several):
        here = domain == at
        alone = DomainOrder(geometry, seed=seed, window=window)
        assert (np.stack(alone.locate(n[here])) == together[:, here]).all()
        for column in np.flatnonzero(here)[:5]:
            single = np.stack(orders.of(at).locate(n[column : column + 1]))
            assert (single[:, 0] == together[:, column]).all()


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_of_any_size(n: int, key: int) -> None:
    out = permute(
        np.arange(n, dtype=np.uint64),
        np.full(n, key, dtype=np.uint64),
        Radix.of(np.array([n])).take(0),
    )
    assert sorted(out.tolist()) == list(range(n))


def test_permute_of_mixed_sizes_is_permute_of_each() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([1, 2, 3, 17, 32, 33, 512, 513, 70_000, 1 << 30], 4000)
    value = (rng.random(4000) * sizes).astype(np.uint64)
    key = rng.integers(0, 2**64, 4000, dtype=np.uint64)
    mixed = permute(value, key, Radix.of(sizes))
    for size in np.unique(sizes):
        here = sizes == size
        alone = permute(value[here], key[here], Radix.of(np.array([size])).take(0))
        assert (alone == mixed[here]).all()
        assert (alone < size).all()


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_are_all_equally_likely(n: int) -> None:
    factorial = {3: 6, 4: 24, 5: 120}[n]
    n_keys = 100 * factorial
    keys = np.random.default_rng(n).integers(0, 2**64, n_keys, dtype=np.uint64)
    value = np.tile(np.arange(n, dtype=np.uint64), n_keys)
    out = permute(value, np.repeat(keys, n), Radix.of(np.array([n])).take(0)).reshape(n_keys, n)
    codes = (out * np.uint64(n) ** np.arange(n, dtype=np.uint64)).sum(axis=1)
    counts = np.unique(codes, return_counts=True)[1]
    assert counts.size == factorial
    # Exactly uniform up to 4; at 5 the network's reach shows a little.
    assert np.abs(counts / 100 - 1).max() < (0.5 if n < 5 else 0.8)


@pytest.mark.parametrize("n", [64, 100, 777, 1000, 1024, 15_625])
def test_places_and_neighbors_are_uniform_over_keys(n: int) -> None:
    n_keys = 200_000 // n
    keys = np.random.default_rng(n).integers(0, 2**64, n_keys, dtype=np.uint64)
    value = np.tile(np.arange(n, dtype=np.uint64), n_keys)
    out = permute(value, np.repeat(keys, n), Radix.of(np.array([n])).take(0))
    place_KN = out.reshape(n_keys, n).astype(np.int64)
    cells = 8
    cell_sizes = np.bincount(np.arange(n) * cells // n, minlength=cells)
    for lag in (1, 2, 8, n // 2):
        first, second = place_KN[:, :-lag] * cells // n, place_KN[:, lag:] * cells // n
        seen = np.bincount((first * cells + second).ravel(), minlength=cells * cells)
        share = np.outer(cell_sizes, cell_sizes) - np.diag(cell_sizes)
        expected = share.ravel() / share.sum() * seen.sum()
        assert p_value(seen, expected) > 1e-5
    jumps = (np.diff(place_KN, axis=1) % n - 1) * 16 // (n - 1)
    expected = np.bincount(np.arange(n - 1) * 16 // (n - 1)) / (n - 1) * jumps.size
    seen = np.bincount(jumps.ravel(), minlength=16)
    assert p_value(seen, expected) > 1e-5


def jump_ratio(order: DomainOrder) -> float:
    """Mean distance on disk between consecutive samples, over that of a random order."""
    units = order.geometry.units
    jumps = np.abs(np.diff(samples(order, np.arange(units))))
    return float(jumps.mean() / ((units + 1) / 3))


def test_consecutive_samples_lie_as_far_apart_as_in_a_random_order() -> None:
    geometry = DomainGeometry("web", units=25_600, group_units=64)
    assert jump_ratio(DomainOrder(geometry, seed=1, window=65_536)) == pytest.approx(1, abs=0.02)
    assert jump_ratio(DomainOrder(geometry, seed=1, window=16)) > 0.9
    assert 0.4 < jump_ratio(DomainOrder(geometry, seed=1, window=2)) < 0.6


def test_samples_of_a_window_are_evenly_spread_over_its_stretch() -> None:
    order = DomainOrder(DomainGeometry("web", units=64_000, group_units=64), seed=5, window=16)
    _, groups, _ = order.locate(np.arange(1024 * 40))
    quarters = groups.reshape(40, 4, 256)
    table = [np.unique(quarters[:, at], return_counts=True)[1].std() for at in range(4)]
    assert max(table) < 5  # 16 rows of each group a quarter; hypergeometric deviation 3.4


@pytest.mark.parametrize("change", ["epoch", "seed", "domain"])
def test_epochs_seeds_and_domains_are_uncorrelated(change: str) -> None:
    units = 10_000
    base = DomainOrder(DomainGeometry("a", units, 50), seed=3, window=16)
    n = np.arange(units)
    other = {
        "epoch": lambda: samples(base, n + units),
        "seed": lambda: samples(DomainOrder(base.geometry, seed=4, window=16), n),
        "domain": lambda: samples(
            DomainOrder(DomainGeometry("b", units, 50), seed=3, window=16), n
        ),
    }[change]()
    first = samples(base, n)
    # Ranks inside stretches of half a window are free of which groups the window holds.
    in_window = np.argsort(np.argsort(first.reshape(-1, 400), axis=1), axis=1)
    in_other = np.argsort(np.argsort(other.reshape(-1, 400), axis=1), axis=1)
    correlation = np.corrcoef(in_window.ravel(), in_other.ravel())[0, 1]
    assert abs(correlation) < 4 / np.sqrt(units)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2
    assert (first != other).mean() > 0.99


def test_the_order_is_frozen() -> None:
    # A change of these numbers changes the data order of every run: it needs a new format.
    order = DomainOrder(DomainGeometry("web", units=1000, group_units=61), seed=7, window=4)
    n = np.array([0, 1, 2, 999, 1000, 123_456_789])
    assert np.stack(order.locate(n)).tolist() == [
        [0, 0, 0, 0, 1, 123_456],
        [10, 7, 10, 16, 12, 14],
        [49, 40, 17, 11, 10, 1],
    ]
    assert domain_key("web") == 8_401_084_237_428_129_872
    assert step_order(7, 5, 2, 6).tolist() == [[0, 5, 4, 2, 1, 3], [1, 3, 5, 2, 4, 0]]


def test_far_into_a_trillion_samples_it_is_still_a_bijection() -> None:
    geometry = DomainGeometry("huge", units=10**12 + 7, group_units=10**5)
    order = DomainOrder(geometry, seed=0, window=16)
    n = np.arange(10**13 + 100, 10**13 + 5100)
    assert np.unique(samples(order, n)).size == 5000
    assert order.locate(n)[0].tolist() == [10] * 5000


def test_no_samples_is_an_error_that_names_the_domain() -> None:
    with pytest.raises(CorpusError, match=r"corpus\.web = 0: no samples"):
        DomainGeometry("web", units=0, group_units=8)


def test_more_groups_than_can_be_permuted_is_an_error() -> None:
    with pytest.raises(CorpusError, match="blocks"):
        DomainOrder(DomainGeometry("web", units=1 << 40, group_units=8), seed=0, window=1)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.integers(1, 7), st.integers(1, 70))
def test_rows_of_a_step_are_permuted_alike_whatever_is_asked_with_it(
    seed: int, first: int, n_steps: int, n_rows: int
) -> None:
    order_SB = step_order(seed, first, n_steps, n_rows)
    assert (np.sort(order_SB, axis=1) == np.arange(n_rows)).all()
    for at in range(n_steps):
        assert (step_order(seed, first + at, 1, n_rows)[0] == order_SB[at]).all()


def test_rows_of_a_step_stand_anywhere() -> None:
    order_SB = step_order(11, 0, 4000, 16)
    seen = np.bincount((order_SB * 16 + np.arange(16)).ravel(), minlength=256)
    assert p_value(seen, seen.mean()) > 1e-4
