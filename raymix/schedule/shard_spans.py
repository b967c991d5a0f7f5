"""Token positions of a rank's shard: one span near the front of the sequence, one near its back.

Of s tokens on w ranks each rank holds c = ceil(s / w), as `shard_tokens` of `cost.model` says. The
first ceil(c / 2) come from the front of the sequence, in rank order, the other floor(c / 2) from
its back, in reverse order. The work of a causal token grows with its position, so this pairing
gives every rank the same work. Positions from s on are padding; they lie at the very end, where no
real token attends to them.
"""

from __future__ import annotations

import numpy as np

from raymix.schedule.layout import Ints

Span = tuple[int, int]


def shard_spans(length: int, width: int, index: int) -> tuple[Span, Span]:
    """Return both spans of positions, as (begin, end), of one rank of a CP group.

    Args:
        length: Tokens of the sequence.
        width: Ranks in the CP group.
        index: Index of the rank in it.
    """
    tokens = -(-length // width)
    # The odd token goes to the front: shards of one token then lie in rank order.
    front, back = tokens - tokens // 2, tokens // 2
    begin = width * front + (width - 1 - index) * back
    return (index * front, (index + 1) * front), (begin, begin + back)


def shard_positions(length: int, width: int, index: int) -> Ints:
    """Return the position of each token of a shard, padding included, shape (c,)."""
    front, back = shard_spans(length, width, index)
    return np.concatenate([np.arange(*front), np.arange(*back)]).astype(np.int64)
