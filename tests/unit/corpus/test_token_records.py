"""Labels and loss masks of ready token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raymix.corpus.read.token_records import labels_mask, loss_edges

IDS = np.array([7, 0, 1, 9])


@pytest.mark.parametrize(
    ("labels", "in_loss"),
    [
        ([-100, 0, -100, 9], [False, True, False, True]),
        ([7, 0, 1, 9], [True] * 4),
        ([-100] * 4, [False] * 4),
        ([0, 1, 1, 0], [False, True, True, False]),
        ([False, True, False, False], [False, True, False, False]),
    ],
)
def test_labels_or_a_mask_say_what_is_in_the_loss(labels: list[Any], in_loss: list[bool]) -> None:
    assert labels_mask(IDS, labels).tolist() == in_loss


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "not one label"),
        ([1, 0, 1], "not one label"),
        ([1, None, 1, 1], "not one label"),
        ([0.5, 1, 1, 1], "not integers"),
        ([0, 1, 9, -100], "own positions"),  # shifted by one
    ],
)
def test_labels_that_do_not_go_with_the_ids(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_mask(IDS, labels)


@pytest.mark.parametrize(
    ("in_loss", "n_tokens", "edges"),
    [
        (None, 4, [1, 4]),
        (None, 5, [1, 5]),
        ([1, 1, 0, 1], 4, [1, 2, 3, 4]),
        ([0, 1, 0, 1], 5, [1, 2, 3, 5]),
        ([0, 1, 1, 0], 5, [1, 3]),
        ([1, 0, 0, 0], 4, []),
    ],
)
def test_edges_leave_out_the_first_token(
    in_loss: list[int] | None, n_tokens: int, edges: list[int]
) -> None:
    mask = None if in_loss is None else np.array(in_loss, np.bool_)
    assert loss_edges(mask, 4, n_tokens).tolist() == edges
