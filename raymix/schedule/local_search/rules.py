"""How widely each sequence of a micro-batch is sharded: rules, and about what they cost.

A rule gives every sequence a level, the position of its team's width in `Layout.widths`; the longer
of two sequences never has the lower level. So a rule is how many sequences have each level or a
higher one, and sums over a level are differences of running sums: a thousand rules are judged at
the cost of seating a few.

Legend as in `seating`; X rules of a micro-batch, L = W - 1 levels above the local one.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np

from raymix.schedule.layout import Floats, Ints
from raymix.schedule.local_search.assignment import Tables

# Rules of at most so many tokens per rank: a rank's memory, half of it, and so on.
_GRAINS = 9
# Where the steps of stairs may be, further on at one and a half times each.
_DENSE = {False: 4, True: 16}


def estimates(tables: Tables) -> Floats:
    """Return about how long the micro-batches take by the best rule, shape (B,)."""
    least_B = _estimates(tables, _cuts(tables)).min(axis=1)
    if tables.widths.size > 2:
        least_B = np.minimum(least_B, _estimates(tables, _fine(tables)).min(axis=1))
    return least_B


def rules(tables: Tables, most: int, *, dense: bool) -> Ints:
    """Return the rules worth trying: the level of each sequence, shape (B, X, K).

    Sequences longer than a cut-off of length on the whole group and the others local: the best
    cut-offs, and everything sharded. Where teams of other widths are allowed, also rules that
    give each rank shards of at most so many tokens, and rules with the ends of levels anywhere.

    Args:
        tables: Costs of the micro-batches.
        most: Rules of each kind.
        dense: Whether more of the last kind are judged.
    """
    n_rows, n_longest = tables.length_BK.shape
    last = tables.widths.size - 1
    whole = np.full((n_rows, 1, last), n_longest)
    found = [_best(tables, _cuts(tables), most), whole]
    if last > 1:
        found = [_best(tables, _fine(tables), most), *found]
        found.append(_best(tables, _stairs(tables, dense), most))
    end_BXL = np.concatenate(found, axis=1)
    return (np.arange(n_longest) < end_BXL[..., None]).sum(axis=2)


def _best(tables: Tables, end_BXL: Ints, most: int) -> Ints:
    best = np.argsort(_estimates(tables, end_BXL), axis=1, kind="stable")[:, :most]
    return np.take_along_axis(end_BXL, best[:, :, None], axis=1)


def _cuts(tables: Tables) -> Ints:
    """Return rules with the c longest sequences on the whole group, c = 0 to K."""
    n_rows, n_longest = tables.length_BK.shape
    shape = (n_rows, n_longest + 1, tables.widths.size - 1)
    return np.broadcast_to(np.arange(n_longest + 1)[:, None], shape)


def _fine(tables: Tables) -> Ints:
    """Return rules that give each rank shards of at most so many tokens."""
    grain_X = tables.cost.memory_tokens * 0.5 ** np.arange(_GRAINS)
    wide = tables.length_BK[:, None, None, :] > (grain_X[:, None] * tables.widths[:-1])[:, :, None]
    return wide.sum(axis=3)


def _stairs(tables: Tables, dense: bool) -> Ints:
    """Return rules with the ends of levels at any of some steps."""
    n_rows, n_longest = tables.length_BK.shape
    steps: list[int] = []
    step = 0
    while step <= n_longest:
        steps.append(step)
        step += 1 if step < _DENSE[dense] else step // 2
    end_XL = np.array(list(combinations_with_replacement(steps, tables.widths.size - 1)))[:, ::-1]
    return np.broadcast_to(end_XL, (n_rows, *end_XL.shape))


def _estimates(tables: Tables, end_BXL: Ints) -> Floats:
    """Return about how long the micro-batches take by each rule, (B, X); inf: cannot fit.

    As if everything could be spread evenly, but for the longest sequence of each level.
    """
    cost, n_ranks = tables.cost, tables.slots.covers_TN.shape[1]
    n_rows, n_longest = tables.length_BK.shape
    row = np.arange(n_rows)[:, None]
    volume = _sums(tables.length_BK)
    gather = shared = tokens = wide_s = wide = np.zeros(end_BXL.shape[:2])
    longest_s = longest = local = local_s = gather
    begin = np.zeros(end_BXL.shape[:2], dtype=np.int64)
    for level in range(tables.widths.size - 1, -1, -1):
        end = end_BXL[:, :, level - 1] if level else np.full_like(begin, n_longest)
        part = tables.widths[level] / n_ranks
        attention_BK, share_BK = tables.attention_BKW[:, :, level], tables.share_BKW[:, :, level]
        seconds, held = (
            sums[row, end] - sums[row, begin] for sums in (_sums(attention_BK), _sums(share_BK))
        )
        first = np.minimum(begin, n_longest - 1)
        first_s = attention_BK[row, first] * (end > begin)
        tokens = tokens + held * part
        if part == 1:
            wide_s, wide = seconds, held
        else:
            longest = np.maximum(longest, share_BK[row, first] * (end > begin))
        if level:
            travels = volume[row, end] - volume[row, begin]
            travel = tables.latency_W[level] + travels * tables.token_W[level]
            gather = gather + np.where(travels > 0, travel, 0) * part
            shared = shared + seconds * part
            longest_s = np.maximum(longest_s, first_s * (part < 1))
        else:
            local, local_s = seconds * part, first_s
        begin = end
    # A group of one rank has one level, local and whole.
    tokens = np.maximum(tokens, wide + longest)
    shared = np.maximum(shared, wide_s * (tables.widths.size > 1) + longest_s)
    busy = np.maximum(gather, np.maximum(local, local_s)) + shared + cost.linear(tokens)
    return np.where(tokens <= cost.memory_tokens, busy, np.inf)


def _sums(value_BK: Floats | Ints) -> Floats:
    """Return sums of the first c values, c = 0 to K, shape (B, K + 1)."""
    sums = np.zeros((value_BK.shape[0], value_BK.shape[1] + 1))
    value_BK.cumsum(axis=1, out=sums[:, 1:])
    return sums
