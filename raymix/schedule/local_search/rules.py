"""Width rules: how many ranks each sequence of a micro-batch is sharded over, with estimated times.

A rule gives every sequence a level, the index of its width in `Layout.widths`; of two sequences the
longer one never has the lower level. A rule is thus the number of sequences at each level or above,
and sums over a level are differences of prefix sums: estimating a thousand rules costs as much as
assigning a few.

Legend as in `assignment`; X rules of a micro-batch, L = W - 1 levels above the local one.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np

from raymix.schedule.layout import Floats, Ints
from raymix.schedule.local_search.assignment import CostTables

# Limits of the tokens of a shard: a rank's memory, half of it, a quarter, ...
_N_SHARD_LIMITS = 9
# Ends of levels are tried at every position up to this one, then at 1.5 times the last.
_UNIT_STEPS, _UNIT_STEPS_DENSE = 4, 16


def estimate_seconds(tables: CostTables) -> Floats:
    """Return the estimated time of each micro-batch by its best rule, shape (B,)."""
    best_B = _estimates(tables, _threshold_rules(tables)).min(axis=1)
    if tables.widths.size > 2:
        by_limit_B = _estimates(tables, _shard_limit_rules(tables)).min(axis=1)
        best_B = np.minimum(best_B, by_limit_B)
    return best_B


def width_rules(tables: CostTables, max_rules: int, *, dense: bool) -> Ints:
    """Return the rules with the least estimated times: the level of each sequence, (B, X, K).

    Threshold rules shard sequences above a length over the whole group and leave the others local;
    one rule shards everything. Where CP groups of other widths are allowed, shard-limit rules bound
    the tokens of a shard, and step rules end the levels at any positions.

    Args:
        tables: Costs of the micro-batches.
        max_rules: Rules of each kind.
        dense: Whether more step rules are estimated.
    """
    n_rows, n_sequences = tables.length_BK.shape
    n_levels = tables.widths.size - 1
    all_sharded = np.full((n_rows, 1, n_levels), n_sequences)
    kinds = [_best(tables, _threshold_rules(tables), max_rules), all_sharded]
    # With one width above local, the other kinds are threshold rules as well.
    if n_levels > 1:
        kinds = [_best(tables, _shard_limit_rules(tables), max_rules), *kinds]
        kinds.append(_best(tables, _step_rules(tables, dense=dense), max_rules))
    end_BXL = np.concatenate(kinds, axis=1)
    return (np.arange(n_sequences) < end_BXL[..., None]).sum(axis=2)


def _best(tables: CostTables, end_BXL: Ints, max_rules: int) -> Ints:
    best = np.argsort(_estimates(tables, end_BXL), axis=1, kind="stable")[:, :max_rules]
    return np.take_along_axis(end_BXL, best[:, :, None], axis=1)


def _threshold_rules(tables: CostTables) -> Ints:
    """Return rules with the c longest sequences on the whole group, c = 0 to K, (B, K + 1, L)."""
    n_rows, n_sequences = tables.length_BK.shape
    shape = (n_rows, n_sequences + 1, tables.widths.size - 1)
    return np.broadcast_to(np.arange(n_sequences + 1)[:, None], shape)


def _shard_limit_rules(tables: CostTables) -> Ints:
    """Return rules with the smallest widths whose shards stay within a limit of tokens."""
    limit_X = tables.cost.memory_tokens * 0.5 ** np.arange(_N_SHARD_LIMITS)
    # A sequence is above a level where its shards at that level's width exceed the limit.
    above = tables.length_BK[:, None, None, :] > (limit_X[:, None] * tables.widths[:-1])[:, :, None]
    return above.sum(axis=3)


def _step_rules(tables: CostTables, *, dense: bool) -> Ints:
    """Return rules with the ends of levels at any of a few positions."""
    n_rows, n_sequences = tables.length_BK.shape
    # Geometric beyond the first: all positions would be K^L rules.
    unit_steps = _UNIT_STEPS_DENSE if dense else _UNIT_STEPS
    positions: list[int] = []
    position = 0
    while position <= n_sequences:
        positions.append(position)
        position += 1 if position < unit_steps else position // 2
    # Descending: a higher level ends no later than the one below it.
    ends = list(combinations_with_replacement(positions, tables.widths.size - 1))
    end_XL = np.array(ends)[:, ::-1]
    return np.broadcast_to(end_XL, (n_rows, *end_XL.shape))


def _estimates(tables: CostTables, end_BXL: Ints) -> Floats:
    """Return the estimated time of each micro-batch by each rule, (B, X); inf: does not fit.

    As if work could be divided evenly, except for the longest sequence of each level, which is
    whole on its ranks.
    """
    cost, n_ranks = tables.cost, tables.slots.covers_TN.shape[1]
    n_rows, n_sequences = tables.length_BK.shape
    row = np.arange(n_rows)[:, None]
    volume_sums = _prefix_sums(tables.length_BK)
    gather = sharded = tokens = group_s = group_tokens = np.zeros(end_BXL.shape[:2])
    longest_s = longest_tokens = local = longest_local_s = gather
    begin = np.zeros(end_BXL.shape[:2], dtype=np.int64)
    # From the widest level down: each begins where the one above it ends.
    for level in range(tables.widths.size - 1, -1, -1):
        end = end_BXL[:, :, level - 1] if level else np.full_like(begin, n_sequences)
        fraction = tables.widths[level] / n_ranks
        attention_BK = tables.attention_BKW[:, :, level]
        tokens_BK = tables.shard_tokens_BKW[:, :, level]
        level_s, level_tokens = (
            sums[row, end] - sums[row, begin]
            for sums in (_prefix_sums(attention_BK), _prefix_sums(tokens_BK))
        )
        # An empty level may begin past the last sequence; its term is multiplied by 0 below.
        first = np.minimum(begin, n_sequences - 1)
        first_s = attention_BK[row, first] * (end > begin)
        tokens = tokens + level_tokens * fraction
        if fraction == 1:
            group_s, group_tokens = level_s, level_tokens
        else:
            longest_tokens = np.maximum(longest_tokens, tokens_BK[row, first] * (end > begin))
        if level:
            volume = volume_sums[row, end] - volume_sums[row, begin]
            level_gather = tables.latency_W[level] + volume * tables.token_W[level]
            gather = gather + np.where(volume > 0, level_gather, 0) * fraction
            sharded = sharded + level_s * fraction
            longest_s = np.maximum(longest_s, first_s * (fraction < 1))
        else:
            local, longest_local_s = level_s * fraction, first_s
        begin = end
    # Sequences on the whole group load every rank, also the one with the longest other sequence.
    tokens = np.maximum(tokens, group_tokens + longest_tokens)
    # In a group of one rank, the level of the whole group is the local one, counted as local.
    sharded = np.maximum(sharded, group_s * (tables.widths.size > 1) + longest_s)
    busy = np.maximum(gather, np.maximum(local, longest_local_s)) + sharded + cost.linear(tokens)
    return np.where(tokens <= cost.memory_tokens, busy, np.inf)


def _prefix_sums(value_BK: Floats | Ints) -> Floats:
    """Return sums of the first c values, c = 0 to K, shape (B, K + 1)."""
    sums = np.zeros((value_BK.shape[0], value_BK.shape[1] + 1))
    value_BK.cumsum(axis=1, out=sums[:, 1:])
    return sums
