"""Which tokens of a sharded sequence a rank holds: a stretch near the front, one near the back.

Of a sequence of s tokens on w ranks each holds c = ceil(s / w), as `shards` of the cost model
says. The first ceil(c / 2) of them come from the front of the sequence, in the order of the
ranks, the other floor(c / 2) from its back, in the opposite order: so a causal token's work,
which grows with its position, sums to the same on every rank. Positions from s on are padding,
at the very end, where no real token looks.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.layout import Ints

Span = tuple[int, int]


def shard_spans(length: int, width: int, index: int) -> tuple[Span, Span]:
    """Return the positions, as (begin, end), of both stretches of rank `index` of a team.

    Args:
        length: Tokens of the sequence.
        width: Ranks in the team.
        index: Which of them.
    """
    held = -(-length // width)
    front, back = held - held // 2, held // 2
    begin = width * front + (width - 1 - index) * back
    return (index * front, (index + 1) * front), (begin, begin + back)


def shard_positions(length: int, width: int, index: int) -> Ints:
    """Return the position of each token that a rank holds, padding included, shape (c,)."""
    front, back = shard_spans(length, width, index)
    return np.concatenate([np.arange(*front), np.arange(*back)]).astype(np.int64)
