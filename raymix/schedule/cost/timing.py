"""Start and busy times of each rank by the cost model, and a lower bound of the step time.

Legend: K sequences, M micro-steps, R ranks, P shards of all sequences (a local sequence is one), W
widths of the layout. A cell is one rank in one micro-step, number micro-step * R + rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymix.schedule.cost.model import CostModel, shard_tokens
from raymix.schedule.layout import Floats, Ints, Layout


@dataclass(frozen=True, slots=True)
class Placement:
    """Micro-step and ranks (first to first + width - 1) of each sequence; all arrays (K,)."""

    micro_K: Ints
    first_K: Ints
    width_K: Ints


@dataclass(frozen=True, slots=True)
class Timing:
    """Tokens and times of a placement per micro-step and rank; all arrays (M, R)."""

    tokens_MR: Ints
    """Tokens on the rank, padding of shards included."""
    gather_MR: Floats
    """Seconds of communication; the rank waits for the part that exceeds the local attention."""
    gathered_MR: Ints
    """Tokens whose keys and values pass through the rank's CP groups."""
    local_MR: Floats
    """Seconds of attention of local sequences."""
    linear_MR: Floats
    """Seconds of the linear layers."""
    busy_MR: Floats
    """Seconds from the start of the rank's micro-step to its end, eq. (1) of `cost.model`."""
    start_MR: Floats
    """Start time in seconds, after waiting for the ranks that share a sequence or a barrier."""
    seconds: float
    """End time of the last rank: the time of the step."""


def compute_timing(length_K: Ints, placement: Placement, layout: Layout, cost: CostModel) -> Timing:
    """Return the times and memory of a placement."""
    n_micro, ranks = int(placement.micro_K.max(initial=-1)) + 1, layout.ranks
    n_cells = n_micro * ranks
    cell_K = placement.micro_K * ranks + placement.first_K
    width_K = placement.width_K
    sequence_P, cell_P = _expand_shards(cell_K, width_K)
    tokens = np.bincount(cell_P, shard_tokens(length_K, width_K)[sequence_P], n_cells)
    attention_K = cost.attention(length_K, width_K)
    local_K = width_K == 1
    local = _sum_per_cell(cell_K[local_K], attention_K[local_K], n_cells)
    sharded_P = ~local_K[sequence_P]
    sharded = _sum_per_cell(cell_P[sharded_P], attention_K[sequence_P[sharded_P]], n_cells)
    gather, gathered = _gather_costs(
        length_K[~local_K], cell_K[~local_K], width_K[~local_K], cost, n_cells
    )
    linear = cost.linear(tokens)
    # Eq. (1): the keys and values of sharded sequences travel during the local attention.
    busy = np.maximum(gather, local) + sharded + linear
    shape = (n_micro, ranks)
    busy_MR = busy.reshape(shape)
    start_MR, seconds = _start_times(busy_MR, _waits_for_next(placement, shape, layout))
    return Timing(
        # bincount with weights returns float64, exact for tokens below 2^53.
        tokens_MR=tokens.astype(np.int64).reshape(shape),
        gather_MR=gather.reshape(shape),
        gathered_MR=gathered.astype(np.int64).reshape(shape),
        local_MR=local.reshape(shape),
        linear_MR=linear.reshape(shape),
        busy_MR=busy_MR,
        start_MR=start_MR,
        seconds=seconds,
    )


def _expand_shards(cell_K: Ints, width_K: Ints) -> tuple[Ints, Ints]:
    """Return the sequence and the cell of every shard, both (P,)."""
    sequence_P = np.repeat(np.arange(cell_K.size), width_K)
    begin_K = np.cumsum(width_K) - width_K
    # Ranks of a CP group are consecutive, and so are their cells.
    return sequence_P, cell_K[sequence_P] + np.arange(sequence_P.size) - begin_K[sequence_P]


def _gather_costs(
    length_K: Ints, cell_K: Ints, width_K: Ints, cost: CostModel, n_cells: int
) -> tuple[Floats, Floats]:
    """Return seconds and tokens of communication per cell, from sharded sequences (K,).

    The sequences of one CP group and micro-step travel in one collective: one latency.
    """
    if not length_K.size:
        return np.zeros(n_cells), np.zeros(n_cells)
    # One integer per CP group and micro-step: np.unique of pairs would sort structured rows.
    base = int(width_K.max()) + 1
    collective, of_K = np.unique(cell_K * base + width_K, return_inverse=True)
    volume = _sum_per_cell(of_K, length_K, collective.size)
    cell, width = np.divmod(collective, base)
    collective_P, cell_P = _expand_shards(cell, width)
    seconds = _sum_per_cell(cell_P, cost.gather(volume, width)[collective_P], n_cells)
    return seconds, _sum_per_cell(cell_P, volume[collective_P], n_cells)


def _sum_per_cell(cell: Ints, value: Floats | Ints, n_cells: int) -> Floats:
    """Return the sum of the values in each cell, shape (n_cells,)."""
    # For empty input bincount returns integers, weights or not.
    sums: Floats = np.bincount(cell, value, n_cells).astype(np.float64)
    return sums


def _waits_for_next(
    placement: Placement, shape: tuple[int, int], layout: Layout
) -> NDArray[np.bool_]:
    """Return whether rank r waits for rank r + 1 in a micro-step, shape (M, R - 1).

    Ranks that wait for each other are consecutive, as CP groups and groups are, so runs of True
    describe them.
    """
    n_micro, ranks = shape
    if layout.barrier == "all":
        return np.ones((n_micro, ranks - 1), dtype=np.bool_)
    # Difference array of the CP groups that span r and r + 1: +1 at the first rank, -1 at the last.
    delta = np.zeros((n_micro, ranks + 1), dtype=np.int64)
    sharded = placement.width_K > 1
    micro, first = placement.micro_K[sharded], placement.first_K[sharded]
    # add.at, not +=: several sequences may begin at one cell, and += would count only one.
    np.add.at(delta, (micro, first), 1)
    np.add.at(delta, (micro, first + placement.width_K[sharded] - 1), -1)
    waits = delta.cumsum(axis=1)[:, : ranks - 1] > 0
    if layout.barrier == "group":
        waits |= (np.arange(1, ranks) % layout.context) != 0
    return waits


def _start_times(busy_MR: Floats, waits_MR: NDArray[np.bool_]) -> tuple[Floats, float]:
    """Return the start time of each rank and micro-step, shape (M, R), and the last end time."""
    start_MR = np.zeros_like(busy_MR)
    clock_R = np.zeros(busy_MR.shape[1])
    for busy, waits, start in zip(busy_MR, waits_MR, start_MR, strict=True):
        first_ranks = np.concatenate([[0], np.flatnonzero(~waits) + 1])
        sizes = np.diff(first_ranks, append=clock_R.size)
        # Ranks that wait for each other start when the last is ready and end with the slowest.
        ready_s = np.maximum.reduceat(clock_R, first_ranks)
        start[:] = np.repeat(ready_s, sizes)
        clock_R = np.repeat(ready_s + np.maximum.reduceat(busy, first_ranks), sizes)
    return start_MR, float(clock_R.max(initial=0.0))


def lower_bound(length_K: Ints, layout: Layout, cost: CostModel) -> float:
    """Return a lower bound in seconds of the step time of any schedule of the batch.

    The larger of two bounds. First, all work shared evenly by all ranks: a sequence costs the least
    on the smallest CP group that can hold it, since eq. (2) summed over the group grows with its
    width, and a rank begins a micro-step at least ceil(tokens / memory) times. Second, the longest
    sequence alone, on its best CP group.
    """
    if not length_K.size:
        return 0.0
    width_K = cost.min_widths(length_K, layout.widths)
    tokens = int(length_K.sum())
    micro_batches = -(-tokens // cost.memory_tokens)
    linear = cost.linear_s * tokens
    work_s = float((width_K * cost.attention(length_K, width_K)).sum())
    work_s += max(linear + cost.base_s * micro_batches, cost.floor_s * micro_batches)
    width_W = np.array(layout.widths)
    longest_W = np.full(width_W.size, int(length_K.max()))
    longest_s_W = (
        np.where(width_W > 1, cost.gather(longest_W, width_W), 0.0)
        + cost.attention(longest_W, width_W)
        + cost.linear(shard_tokens(longest_W, width_W))
    )
    fits_W = shard_tokens(longest_W, width_W) <= cost.memory_tokens
    return max(work_s / layout.ranks, float(longest_s_W[fits_W].min()))
