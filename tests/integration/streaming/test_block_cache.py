"""Cache policy of the block plane (order of loads, evictions), and prefetching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.store import Block, Corpus
from raymix.streaming.batches.stream import MixtureStream
from raymix.streaming.blocks.block_batch import (
    BlockBatch,
    from_table,
    make_block_batch,
    to_table,
)
from raymix.streaming.blocks.cache import BlockCache
from raymix.streaming.blocks.sources import LocalSource
from tests.support.corpora import labeled_domain, write_corpus
from tests.support.streams import ROW, fixed, local, packed

BUNDLE = 4


def cache(budget: int) -> BlockCache[str]:
    return BlockCache(budget, size_of=lambda _: 1, domain_of=lambda number: number // 100)


def load(into: BlockCache[str], bundles: list[list[int]]) -> None:
    for numbers in bundles:
        into.add(numbers, f"ref{numbers}")


def test_what_is_waited_for_goes_first_then_what_is_needed_first() -> None:
    policy = cache(100)
    policy.announce(0, 1, 0, [1, 2, 3, 4, 101, 201], [9, 8, 7, 6, 2, 1])
    policy.request([301], urgent=True)
    # Nothing is here yet: in the order of need, whatever the domain.
    assert policy.plan(100, BUNDLE) == [[301, 201, 101, 4], [3, 2, 1]]
    assert policy.plan(100, BUNDLE) == []  # they are being loaded
    load(policy, [[301, 201, 101, 4], [3, 2, 1]])
    policy.announce(0, 1, 1, [5, 102, 6, 202, 7, 8], [1, 2, 3, 4, 5, 6])
    policy.request([401, 302], urgent=True)
    assert policy.plan(100, BUNDLE, urgent_bytes=1) == [[401], [302], [5, 6, 7, 8], [102, 202]]


def test_a_bundle_is_found_by_each_of_its_blocks() -> None:
    policy = cache(100)
    policy.request([1, 2, 3, 4, 5], urgent=True)
    load(policy, policy.plan(100, BUNDLE))
    assert policy.refs([2, 3, 9]) == ["ref[1, 2, 3, 4]"]
    assert policy.refs([5, 1]) == ["ref[5]", "ref[1, 2, 3, 4]"]
    policy.drop([3])
    assert policy.refs([1, 5]) == ["ref[5]"]
    assert policy.used_bytes == 1


def test_what_is_needed_last_makes_room_but_never_for_what_is_needed_later() -> None:
    policy = cache(8)
    policy.announce(0, 1, 0, list(range(8)), [0, 0, 0, 0, 50, 50, 50, 50])
    load(policy, policy.plan(100, BUNDLE))
    policy.announce(0, 1, 1, [*range(8), 100, 101], [1, 1, 1, 1, 50, 50, 50, 50, 60, 60])
    assert policy.plan(100, BUNDLE) == []
    policy.announce(0, 1, 2, [*range(8), 100, 101], [2, 2, 2, 2, 50, 50, 50, 50, 40, 40])
    assert policy.plan(100, BUNDLE) == [[100, 101]]
    assert policy.refs([0])
    assert not policy.refs([4])


def test_the_slowest_rank_keeps_its_blocks() -> None:
    policy = cache(4)
    policy.announce(0, 2, 0, [0, 1, 2, 3], [0, 1, 2, 3])
    load(policy, policy.plan(100, BUNDLE))
    policy.announce(1, 2, 9, [10, 11], [9, 10])  # this rank is far ahead
    assert policy.plan(100, BUNDLE) == []
    policy.announce(0, 2, 8, [3, 10], [8, 9])  # the slow one has moved on, but for block 3
    assert policy.plan(100, BUNDLE) == []
    policy.announce(0, 2, 9, [10, 11], [9, 10])
    assert policy.plan(100, BUNDLE) == [[10, 11]]


def test_waiting_may_exceed_the_budget_rather_than_wait_for_ever() -> None:
    policy = cache(2)
    policy.request([1, 2, 3], urgent=True)
    assert policy.plan(100, BUNDLE) == [[1, 2, 3]]


def test_failed_loads_are_tried_again() -> None:
    policy = cache(10)
    policy.request([1], urgent=True)
    policy.request([2], urgent=False)
    bundles = policy.plan(100, BUNDLE)
    assert bundles == [[1, 2]]
    policy.end_loading([1, 2])
    assert policy.plan(100, BUNDLE) == bundles


@given(data=st.data())
def test_the_budget_holds_and_wants_are_met_in_the_end(data: st.DataObject) -> None:
    budget = data.draw(st.integers(4, 30))
    policy = cache(budget)
    for step in range(6):
        needed = data.draw(st.lists(st.integers(0, 60), max_size=budget, unique=True))
        policy.announce(0, 1, step, needed, [step + float(at) for at in range(len(needed))])
        for _ in range(20):
            bundles = policy.plan(data.draw(st.integers(1, 10)), BUNDLE)
            assert sum(map(len, bundles)) + policy.used_bytes <= budget
            load(policy, bundles)
        first = needed[: budget // BUNDLE // 2]
        assert len(policy.refs(first)) >= min(1, len(first))
        assert all(policy.refs([number]) for number in first)


@pytest.mark.parametrize("row_tokens", [1, 4, 7])
def test_a_batch_survives_its_table_whole(row_tokens: int) -> None:
    generator = np.random.default_rng(0)
    blocks = [
        Block(
            generator.integers(0, 99, size).astype(np.uint16),
            np.flatnonzero(generator.random(size) < 0.3).astype(np.uint32),
        )
        for size in (20, 0, 23, 5)
    ]
    batch = make_block_batch([7, 8, 9, 3], blocks, row_tokens)
    back, errors = from_table(to_table(batch, [None, "broken", None, None]), row_tokens)
    assert errors == {8: "broken"}
    assert back.numbers == [7, 9, 3]
    np.testing.assert_array_equal(back.tokens, batch.tokens)
    np.testing.assert_array_equal(back.starts, batch.starts)
    for number, block in zip([7, 9, 3], [blocks[0], blocks[2], blocks[3]], strict=True):
        first = int(back.first_K[back.numbers.index(number)])
        whole = len(block.tokens) // row_tokens * row_tokens
        np.testing.assert_array_equal(back.tokens[first : first + whole], block.tokens[:whole])
    starts = np.zeros(len(batch.tokens), dtype=bool)
    starts[batch.starts] = True
    rows = starts.reshape(-1, row_tokens)
    assert batch.labels_N.tolist() == (row_tokens - 1 - rows[:, 1:].sum(axis=1)).tolist()


class Prefetching(LocalSource):
    """Reads what is needed in advance, and counts what had to be waited for nevertheless."""

    def __init__(self, corpus: Corpus, budget_bytes: int) -> None:
        super().__init__(corpus, row_tokens=ROW, budget_bytes=budget_bytes)
        self.waits: list[int] = []
        self.max_needed = 0
        self._coming: list[int] = []

    def prefetch(
        self, step: int, numbers: Sequence[int], steps: Sequence[float], missing: Sequence[int]
    ) -> None:
        assert list(steps) == sorted(steps)
        self.max_needed = max(self.max_needed, sum(math.isfinite(s) for s in steps))
        self._coming = list(missing)

    def poll(self) -> list[BlockBatch]:
        coming, self._coming = self._coming, []
        return super().fetch(coming)

    def fetch(self, numbers: Sequence[int]) -> list[BlockBatch]:
        self.waits += numbers
        return super().fetch(numbers)


def test_rare_domains_neither_starve_nor_fill_the_store(tmp_path: Path) -> None:
    weights = np.geomspace(0.5, 0.001, 40)
    weights /= weights.sum()
    block = 4 * ROW
    corpus = write_corpus(
        tmp_path,
        {f"d{d:02d}": labeled_domain(d % 16, 40 * block, 9.0) for d in range(40)},
        block_tokens=block,
        shard_blocks=40,
    )
    capacity = 240  # of 1,600 blocks
    source = Prefetching(corpus, capacity * block * 2)
    data = packed(rows_per_step=16, shuffle_blocks=16)
    stream = MixtureStream(
        corpus,
        data,
        seed=1,
        rank=0,
        world_size=1,
        controller=local(fixed(weights.tolist()), corpus),
        source=source,
    )
    counts = np.zeros(40)
    for _ in range(600):
        counts += stream.next().counts_D
    assert (counts > 0).all()
    assert source.max_needed <= capacity
    # How far ahead blocks are asked for follows the pace, which a busy machine may disturb.
    assert len(source.waits) <= 6
