"""When each rank works on each micro-step, by the cost model; and what no schedule can beat.

Legend: K sequences, M micro-steps, R ranks, P pieces (a sharded sequence is one per rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymix.schedule.cost.model import CostModel, shards
from raymix.schedule.layout import Floats, Ints, Layout


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each sequence goes: ranks first to first + width - 1, in a micro-step; all (K,)."""

    micro_K: Ints
    first_K: Ints
    width_K: Ints


@dataclass(frozen=True, slots=True)
class Timing:
    """What a placement means rank by rank; all arrays (M, R)."""

    tokens_MR: Ints
    """Tokens held."""
    gather_MR: Floats
    """Seconds of communication, of which what exceeds the local attention is waited for."""
    gathered_MR: Ints
    """Tokens whose keys and values pass through the rank's teams."""
    local_MR: Floats
    """Seconds of attention of local sequences."""
    linear_MR: Floats
    """Seconds of the linear layers."""
    busy_MR: Floats
    """Seconds from the start of the rank's micro-step to its end, eq. (1) of `cost`."""
    start_MR: Floats
    """When it starts, after waiting for those it shares work or a barrier with."""
    seconds: float
    """When the last rank ends: the time of the step."""


def timing(length_K: Ints, placed: Placement, layout: Layout, cost: CostModel) -> Timing:
    """Return the times and memory of a placement."""
    n_micro, ranks = int(placed.micro_K.max(initial=-1)) + 1, layout.ranks
    cells = n_micro * ranks
    cell_K = placed.micro_K * ranks + placed.first_K
    width_K = placed.width_K
    piece_P, cell_P = _spread(cell_K, width_K)
    tokens = np.bincount(cell_P, shards(length_K, width_K)[piece_P], cells)
    attention_K = cost.attention(length_K, width_K)
    local_K = width_K == 1
    local = _sum(cell_K[local_K], attention_K[local_K], cells)
    shared_P = ~local_K[piece_P]
    sharded = _sum(cell_P[shared_P], attention_K[piece_P[shared_P]], cells)
    gather, gathered = _gathers(
        length_K[~local_K], cell_K[~local_K], width_K[~local_K], cost, cells
    )
    linear = cost.linear(tokens)
    busy = np.maximum(gather, local) + sharded + linear
    shape = (n_micro, ranks)
    busy_MR = busy.reshape(shape)
    start_MR, seconds = _clocks(busy_MR, _joined(placed, shape, layout))
    return Timing(
        tokens_MR=tokens.astype(np.int64).reshape(shape),
        gather_MR=gather.reshape(shape),
        gathered_MR=gathered.astype(np.int64).reshape(shape),
        local_MR=local.reshape(shape),
        linear_MR=linear.reshape(shape),
        busy_MR=busy_MR,
        start_MR=start_MR,
        seconds=seconds,
    )


def _spread(cell_K: Ints, width_K: Ints) -> tuple[Ints, Ints]:
    """Return the sequence and the cell (micro-step, rank) of every piece, both (P,)."""
    piece_P = np.repeat(np.arange(cell_K.size), width_K)
    begin_K = np.cumsum(width_K) - width_K
    return piece_P, cell_K[piece_P] + np.arange(piece_P.size) - begin_K[piece_P]


def _gathers(
    length_K: Ints, cell_K: Ints, width_K: Ints, cost: CostModel, cells: int
) -> tuple[Floats, Floats]:
    """Return seconds and tokens of communication per cell; sequences of one team travel at once."""
    if not length_K.size:
        return np.zeros(cells), np.zeros(cells)
    most = int(width_K.max()) + 1
    team, of_K = np.unique(cell_K * most + width_K, return_inverse=True)
    volume = _sum(of_K, length_K, team.size)
    cell, width = np.divmod(team, most)
    at, where = _spread(cell, width)
    seconds = _sum(where, cost.gather(volume, width)[at], cells)
    return seconds, _sum(where, volume[at], cells)


def _sum(cell: Ints, value: Floats | Ints, cells: int) -> Floats:
    """Return the sum of the values in each cell, shape (cells,)."""
    found: Floats = np.bincount(cell, value, cells).astype(np.float64)
    return found


def _joined(placed: Placement, shape: tuple[int, int], layout: Layout) -> NDArray[np.bool_]:
    """Return whether rank r waits for rank r + 1 in a micro-step, shape (M, R - 1)."""
    n_micro, ranks = shape
    if layout.barrier == "all":
        return np.ones((n_micro, ranks - 1), dtype=np.bool_)
    opened = np.zeros((n_micro, ranks + 1), dtype=np.int64)
    shared = placed.width_K > 1
    micro, first = placed.micro_K[shared], placed.first_K[shared]
    np.add.at(opened, (micro, first), 1)
    np.add.at(opened, (micro, first + placed.width_K[shared] - 1), -1)
    joined = opened.cumsum(axis=1)[:, : ranks - 1] > 0
    if layout.barrier == "group":
        joined |= (np.arange(1, ranks) % layout.context) != 0
    return joined


def _clocks(busy_MR: Floats, joined_MR: NDArray[np.bool_]) -> tuple[Floats, float]:
    """Return when each rank starts each micro-step, shape (M, R), and when the last one ends."""
    start_MR = np.zeros_like(busy_MR)
    clock = np.zeros(busy_MR.shape[1])
    for busy, joined, start in zip(busy_MR, joined_MR, start_MR, strict=True):
        heads = np.concatenate([[0], np.flatnonzero(~joined) + 1])
        sizes = np.diff(heads, append=clock.size)
        begin = np.maximum.reduceat(clock, heads)
        start[:] = np.repeat(begin, sizes)
        clock = np.repeat(begin + np.maximum.reduceat(busy, heads), sizes)
    return start_MR, float(clock.max(initial=0.0))


def lower_bound(length_K: Ints, layout: Layout, cost: CostModel) -> float:
    """Return seconds below which no schedule of the batch can be, whatever the planner.

    The larger of two bounds. All ranks share all work evenly: a sequence costs the least on the
    narrowest team that can hold it, since (2) summed over a team grows with its width; and
    ceil(tokens / memory) times a rank must begin a micro-step. The longest sequence, on the team
    that is best for it, alone.
    """
    if not length_K.size:
        return 0.0
    least_K = cost.narrowest(length_K, layout.widths)
    tokens = int(length_K.sum())
    starts = -(-tokens // cost.memory_tokens)
    linear = cost.linear_s * tokens
    total = float((least_K * cost.attention(length_K, least_K)).sum())
    total += max(linear + cost.base_s * starts, cost.floor_s * starts)
    width_W = np.array(layout.widths)
    longest = np.full(width_W.size, int(length_K.max()))
    alone_W = (
        np.where(width_W > 1, cost.gather(longest, width_W), 0.0)
        + cost.attention(longest, width_W)
        + cost.linear(shards(longest, width_W))
    )
    held_W = shards(longest, width_W) <= cost.memory_tokens
    return max(total / layout.ranks, float(alone_W[held_W].min()))
