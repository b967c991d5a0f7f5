"""Spans of tokens to learn: counts and masks agree, whatever the stretch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.store import LossMask
from raymix.store.loss_mask import read_loss_mask, write_loss_mask

EDGES = st.lists(st.integers(0, 60), unique=True, max_size=12).map(
    lambda edges: np.array(sorted(edges)[: len(edges) // 2 * 2], dtype=np.int64)
)


@given(EDGES, st.integers(0, 60), st.integers(0, 60))
def test_count_and_mask_say_what_the_spans_say(edges: np.ndarray, one: int, two: int) -> None:
    first, last = min(one, two), max(one, two)
    inside = np.zeros(64, dtype=np.bool_)
    for begin, end in edges.reshape(-1, 2):
        inside[begin:end] = True
    loss_mask = LossMask(edges)
    assert loss_mask.mask(first, last).tolist() == inside[first:last].tolist()
    counted = loss_mask.count(np.array([first]), np.array([last]))
    assert counted.tolist() == [inside[first:last].sum()]


def test_what_is_written_in_pieces_is_read_as_a_whole(tmp_path: Path) -> None:
    pieces = [np.array([1, 3]), np.array([], dtype=np.int64), np.array([7, 9, 12, 20])]
    url = str(tmp_path / "loss_mask.arrow")
    digest = write_loss_mask(url, pieces)
    assert read_loss_mask(url).edge_E.tolist() == [1, 3, 7, 9, 12, 20]
    assert digest == write_loss_mask(url, pieces)
    write_loss_mask(url, [])
    assert not read_loss_mask(url).mask(0, 5).any()
    assert read_loss_mask(url).count(np.array([0]), np.array([9])).tolist() == [0]


@pytest.mark.parametrize("edges", [[3], [3, 3], [5, 4], [-1, 4], [1, 4, 4, 6]])
def test_spans_that_do_not_rise_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="do not increase"):
        LossMask(np.array(edges, dtype=np.int64))
