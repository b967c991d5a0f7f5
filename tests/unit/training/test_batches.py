"""Rows to tensors: positions, labels, micro-batches, and the sums over ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymix.training.model.loss import IGNORED
from raymix.training.model.parallel import World
from raymix.training.step.batches import (
    MicroBatchTensors,
    count_micro_batches,
    max_rows_per_rank,
    micro_batches,
    positions_and_labels,
    starts_mask,
)
from raymix.training.step.metrics import StepMetrics

CPU = torch.device("cpu")


def rows_of(tokens: np.ndarray, starts: list[list[int]]) -> SimpleNamespace:
    offsets = np.cumsum([0, *(len(row) for row in starts)])
    positions = np.array([at for row in starts for at in row], dtype=np.int64)
    return SimpleNamespace(tokens=tokens, row_starts=(offsets, positions))


def test_positions_restart_and_labels_stop_at_documents() -> None:
    tokens = np.arange(10, 16)[None]
    starts = starts_mask((1, 6), np.array([0, 2]), np.array([2, 5]))
    positions, labels = positions_and_labels(tokens, starts)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert labels.tolist() == [[11, IGNORED, 13, 14, IGNORED, IGNORED]]


@given(st.lists(st.lists(st.integers(0, 11), unique=True), min_size=1, max_size=5))
def test_label_count_is_that_of_the_plan(starts: list[list[int]]) -> None:
    """The stream counts L - 1 minus the starts at offsets from 1 on; so must the labels."""
    starts = [sorted(row) for row in starts]
    tokens = np.ones((len(starts), 12), dtype=np.int64)
    offsets, positions = rows_of(tokens, starts).row_starts
    _, labels = positions_and_labels(tokens, starts_mask(tokens.shape, offsets, positions))
    expected = [11 - sum(at > 0 for at in row) for row in starts]
    assert (labels != IGNORED).sum(axis=1).tolist() == expected


@given(rows=st.integers(0, 9), count=st.integers(1, 6))
def test_micro_batches_cover_all_rows_once_in_order(rows: int, count: int) -> None:
    tokens = np.arange(rows * 8, dtype=np.uint16).reshape(rows, 8)
    batches = list(micro_batches(rows_of(tokens, [[0]] * rows), count, CPU))
    assert len(batches) == count
    real = [micro for micro in batches if micro.rows.start < micro.rows.stop]
    joined = torch.cat([micro.tokens_BL for micro in real]) if real else torch.empty(0, 8)
    assert joined.tolist() == tokens.tolist()
    sizes = [len(micro.tokens_BL) for micro in real]
    assert not sizes or max(sizes) - min(sizes) <= 1
    stand_ins = [micro for micro in batches if micro.rows.start == micro.rows.stop]
    assert all((micro.labels_BL == IGNORED).all() for micro in stand_ins)


@given(rows=st.integers(1, 50), world=st.integers(1, 8), size=st.integers(1, 9))
def test_no_micro_batch_is_larger_than_allowed(rows: int, world: int, size: int) -> None:
    count = count_micro_batches(max_rows_per_rank(rows, world), size)
    for rank in range(world):
        own = rows * (rank + 1) // world - rows * rank // world
        assert -(-own // count) <= size


def micro(labels: torch.Tensor, rows: slice) -> MicroBatchTensors:
    return MicroBatchTensors(labels, labels, labels, rows)


def test_account_adds_up_by_row_and_by_token() -> None:
    loss = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    labels = torch.tensor([[1, 1], [1, IGNORED], [1, 1]])
    by_row = StepMetrics(3, World())
    for part in (slice(0, 2), slice(2, 3), slice(3, 3)):
        own = labels[part] if part.start < 3 else torch.full((1, 2), IGNORED)
        losses = loss[part] if part.start < 3 else torch.zeros(1, 2)
        by_row.add(micro(own, part), np.array([2, 0, 2]), losses)
    sums = by_row.start(checkpoint=False, stop=True).result()
    assert sums.loss == 63
    assert (sums.checkpoint, sums.stop) == (False, True)
    assert sums.nats_D.tolist() == [12, 0, 51]
    assert sums.labels_D.tolist() == [1, 0, 4]
    by_token = StepMetrics(3, World())
    domains = np.array([[0, 1], [1, 1], [2, -1]])
    padded = torch.where(torch.tensor(domains) < 0, IGNORED, labels)
    by_token.add(micro(padded, slice(0, 3)), domains, loss * (torch.tensor(domains) >= 0))
    assert by_token.start(checkpoint=False, stop=False).result().nats_D.tolist() == [1, 14, 16]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_decides(rank: int) -> None:
    metrics = StepMetrics(1, World(rank=rank))
    sums = metrics.start(checkpoint=True, stop=True).result()
    assert (sums.checkpoint, sums.stop) == (rank == 0, rank == 0)
