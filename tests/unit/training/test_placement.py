"""Groups of workers on nodes: whole where a node holds one, across nodes where none does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymix.errors import ClusterError
from raymix.training.launch.placement import (
    NODE_LABEL,
    Node,
    WorkerPlacement,
    place_workers,
    scaling_options,
)

WORKER = {"CPU": 1.0, "GPU": 1.0}


def nodes(*gpus: int) -> list[Node]:
    return [Node(f"n{at}", {"CPU": 64.0, "GPU": float(n)}) for at, n in enumerate(gpus)]


def test_one_node_takes_all_where_it_can() -> None:
    placement = place_workers(nodes(4, 8), WORKER, group_size=4, groups=2)
    assert placement == WorkerPlacement("STRICT_PACK", (WORKER,) * 8, (), split_groups=False)
    assert scaling_options(placement) == {"placement_strategy": "STRICT_PACK"}


def test_single_workers_are_left_to_ray() -> None:
    placement = place_workers(nodes(4, 8), WORKER, group_size=1, groups=3)
    assert scaling_options(placement) == {"placement_strategy": "PACK"}


def test_even_nodes_need_no_ties() -> None:
    placement = place_workers(nodes(8, 8, 8), WORKER, group_size=4, groups=5)
    assert (placement.strategy, placement.selectors, placement.split_groups) == ("PACK", (), False)


def test_groups_are_tied_to_nodes_that_they_do_not_fill() -> None:
    placement = place_workers(nodes(6, 4, 9), WORKER, group_size=4, groups=4)
    ids = [selector[NODE_LABEL] for selector in placement.selectors]
    assert ids == ["n2"] * 8 + ["n0"] * 4 + ["n1"] * 4
    assert scaling_options(placement)["label_selector"][0] == {NODE_LABEL: "n2"}


def test_groups_larger_than_a_node_go_across() -> None:
    placement = place_workers(nodes(8, 8), WORKER, group_size=16, groups=1)
    assert (placement.strategy, placement.selectors, placement.split_groups) == ("PACK", (), True)


def test_too_many_workers_are_refused_with_the_numbers() -> None:
    with pytest.raises(ClusterError, match=r"cluster.workers = 20: .* can take 16 .* 1 GPU each"):
        place_workers(nodes(8, 8), WORKER, group_size=4, groups=5)


@given(
    gpus=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    size=st.integers(1, 9),
    groups=st.integers(1, 6),
)
def test_a_tied_group_lies_on_one_node_with_room(gpus: list[int], size: int, groups: int) -> None:
    try:
        placement = place_workers(nodes(*gpus), WORKER, group_size=size, groups=groups)
    except ClusterError:
        assert sum(gpus) < size * groups
        return
    assert len(placement.bundles) == size * groups
    assert placement.split_groups == (
        (size == 1 or max(gpus) < size * groups) and sum(n // size for n in gpus) < groups
    )
    ids = [selector[NODE_LABEL] for selector in placement.selectors]
    assert len(ids) in {0, size * groups}
    for at in range(0, len(ids), size):
        assert len(set(ids[at : at + size])) == 1
    for at, n in enumerate(gpus):
        assert ids.count(f"n{at}") <= n
