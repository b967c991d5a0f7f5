"""Shared parts of the tests of schedules: simple cost models, an independent clock."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from raymix.schedule import CostModel, Layout, Link, Schedule, preset

PLAIN = CostModel(quadratic_s=1e-6, linear_s=1e-3, memory_tokens=100)
"""One second per thousand tokens, and one per thousand tokens squared; nothing else."""


def cost_of(**changes: Any) -> CostModel:
    return replace(PLAIN, **changes)


def full_cost(memory_tokens: int = 100) -> CostModel:
    """A model with every term, in seconds that a person can add."""
    return CostModel(
        quadratic_s=1e-4,
        edge_s=2e-3,
        piece_s=0.01,
        linear_s=1e-2,
        base_s=0.05,
        floor_s=0.2,
        links=(Link(2, 0.1, 1e-3), Link(8, 0.3, 5e-3)),
        memory_tokens=memory_tokens,
    )


@st.composite
def problems(draw: st.DrawFn, *, most: int = 24) -> tuple[list[int], Layout, CostModel]:
    """Lengths, ranks and a cost model such that every sequence fits in a group."""
    context = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    inner = [width for width in (2, 3, 4) if context % width == 0]
    layout = Layout(
        draw(st.integers(1, 4)),
        context,
        barrier=draw(st.sampled_from(["group", "all", "none"])),
        widths=tuple(draw(st.lists(st.sampled_from(inner), max_size=1))) if inner else (),
    )
    room = draw(st.integers(1, 400))
    short = st.integers(1, max(1, room // 3))
    length = st.one_of(short, st.integers(1, room * context), st.just(room * context))
    lengths = draw(st.lists(length, min_size=1, max_size=most))
    model = draw(st.sampled_from(["0.5b", "7b"]))
    assumed = preset(model, draw(st.sampled_from(["nvlink", "slow"])))
    cost = draw(st.sampled_from([assumed, full_cost(), PLAIN]))
    return lengths, layout, replace(cost, memory_tokens=room)


def clock(schedule: Schedule, cost: CostModel) -> float:
    """The time of a step, rank by rank and term by term, as the module's text defines it."""
    layout = schedule.layout
    now = [0.0] * layout.ranks
    plans = [schedule.micro_batches(rank) for rank in range(layout.ranks)]
    for micro in range(schedule.micro_steps):
        spent = [0.0] * layout.ranks
        waits: list[set[int]] = []
        for rank, plan in enumerate(plans):
            batch = plan[micro]
            lengths = schedule.length_K
            local = sum(attention(cost, int(lengths[k]), 1) for k in batch.local)
            tokens = sum(int(lengths[k]) for k in batch.local)
            volume: dict[tuple[int, ...], int] = defaultdict(int)
            shared = 0.0
            for shard in batch.sharded:
                length, width = int(lengths[shard.sequence]), len(shard.ranks)
                shared += attention(cost, length, width)
                tokens += -(-length // width)
                volume[shard.ranks] += length
                waits.append(set(shard.ranks))
            gather = 0.0
            for ranks, total in volume.items():
                link = cost.link(len(ranks))
                gather += link.latency_s + link.token_s * total
            linear_s = max(cost.floor_s, cost.base_s + cost.linear_s * tokens) if tokens else 0.0
            spent[rank] = max(gather, local) + shared + linear_s
            assert batch.tokens == tokens
            assert np.isclose(batch.seconds, spent[rank])
        everyone = set(range(layout.ranks))
        if layout.barrier == "all":
            waits = [everyone]
        if layout.barrier == "group":
            n = layout.context
            waits += [set(range(g * n, g * n + n)) for g in range(layout.groups)]
        for ranks in merged([*waits, *({rank} for rank in everyone)]):
            end = max(now[rank] for rank in ranks) + max(spent[rank] for rank in ranks)
            for rank in ranks:
                now[rank] = end
    return max(now, default=0.0)


def attention(cost: CostModel, length: int, width: int) -> float:
    return cost.quadratic_s * length**2 / width + cost.edge_s * length + cost.piece_s


def merged(sets: list[set[int]]) -> list[set[int]]:
    """The sets joined wherever two share a member."""
    joined_sets: list[set[int]] = []
    for item in sets:
        apart = [other for other in joined_sets if not other & item]
        joined = set(item).union(*(other for other in joined_sets if other & item))
        joined_sets = [*apart, joined]
    return joined_sets
