"""Many steps of the allocation rule at once, while a closed form gives the same rows.

Rows are whole, so the fraction of a domain's carry does not depend on its rows: after t steps it
is frac(c + t * request). Write a carry as c_d = f_d - s_d with f_d that fraction. The carries
sum to a constant K, so the s_d sum to sum(f) - K, known for every t as well. Suppose every s_d is
0 or 1, and 1 for the largest f_d. Then the rows given in the step are the ones of the rule in
`raymix.sampling.allocate`, if only none of them is negative: what was taken from a domain was
worth f_d + 1 or more (s_d = 0) or f_d (s_d = 1), what was left is worth f_d (s_d = 0) or less than
0 (s_d = 1), so everything taken was worth at least as much as anything left, and among equals the
lowest index was served first.

It fails where a domain is in debt (it was given a row before it was due) and would have to give
it back, which happens to domains of less than a row a step. So the result is checked step by step
and cut off before the first that does not hold.
"""

from __future__ import annotations

import numpy as np

from raymix.sampling.shares import SHARE_BITS, Ints

_FRACTION = (1 << SHARE_BITS) - 1
_INDEX_BITS = 6

MAX_DOMAINS = 1 << _INDEX_BITS
"""Domains that `closed_form` can rank."""


def closed_form(carry_D: Ints, request_D: Ints, n_steps: int) -> Ints:
    """Return the rows of each domain in the first steps, shape (S, D), S <= `n_steps`.

    Args:
        carry_D: Carries before the first step, shape (D,), D <= `MAX_DOMAINS`.
        request_D: What a step adds to them: its rows times the shares, shape (D,).
        n_steps: Steps wanted; fewer come back where the closed form does not hold.
    """
    last = carry_D.size - 1
    # The sums may overflow: only their last SHARE_BITS bits count, and those stay right.
    fraction_TD = (carry_D + np.arange(n_steps + 1)[:, None] * request_D) & _FRACTION
    ahead_T = (fraction_TD.sum(axis=1) - carry_D.sum()) >> SHARE_BITS
    # One integer per domain sorts by fraction, then by lowest index.
    code_TD = fraction_TD << _INDEX_BITS | (last - np.arange(last + 1))
    place_T = np.clip(last + 1 - ahead_T, 0, last)
    least_T = np.take_along_axis(np.sort(code_TD, axis=1), place_T[:, None], axis=1)
    given_TD = (code_TD >= least_T) & (ahead_T > 0)[:, None]
    after_TD = fraction_TD - (given_TD.astype(np.int64) << SHARE_BITS)
    after_TD[0] = carry_D
    counts_SD = (after_TD[:-1] + request_D - after_TD[1:]) >> SHARE_BITS
    holds_S = (counts_SD >= 0).all(axis=1) & (ahead_T[1:] >= 0) & (ahead_T[1:] <= last + 1)
    return counts_SD if holds_S.all() else counts_SD[: np.argmin(holds_S)]
