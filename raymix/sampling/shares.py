"""Shares of tokens as integers, and the epochs and rows they imply.

Floats end here: everything after `fixed_point` is integer arithmetic, so a run makes the same
choices on every platform. Axes: D domains, S steps.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SHARE_BITS = 40
"""Shares are integers in units of 2**-40."""


def fixed_point(weights_D: ArrayLike, *, bits: int = SHARE_BITS) -> Ints:
    """Return shares as integers, shape (D,), in units of 2**-bits and summing to 2**bits.

    Each is within one unit of its weight divided by the sum of the weights, except that a
    positive weight gets at least one unit; the largest share pays for that. A zero stays zero.

    Args:
        weights_D: Weights of any positive sum, shape (D,).
        bits: Binary digits after the point.

    Raises:
        ValueError: If a weight is negative or not finite, or none is positive.
    """
    weight_D = np.asarray(weights_D, dtype=np.float64)
    if weight_D.ndim != 1 or not np.isfinite(weight_D).all() or (weight_D < 0).any():
        raise ValueError(f"weights must be finite, >= 0 and one per domain, not {weights_D!r}")
    # fsum rounds once, whatever the order of additions, so it is the same on every platform.
    total = math.fsum(weight_D)
    if total <= 0:
        raise ValueError("weights are all zero: at least one domain needs a share")
    scaled_D = weight_D / total * float(1 << bits)
    q_D = np.maximum(scaled_D.astype(np.int64), weight_D > 0)
    missing = (1 << bits) - int(q_D.sum())
    # Largest remainders first (Hamilton), ties by index.
    if missing > 0:
        q_D[np.argsort(np.floor(scaled_D) - scaled_D, kind="stable")[:missing]] += 1
    elif missing < 0:
        q_D[np.argmax(q_D)] += missing
    return q_D


def restricted(q_D: Ints, open_D: NDArray[np.bool_]) -> Ints:
    """Return `q_D` with closed domains at zero and the others scaled up to the same sum.

    Exact integer arithmetic: floors, then one unit each to the largest remainders.
    """
    total = int(q_D.sum())
    open_domains = np.flatnonzero(open_D & (q_D > 0))
    out_D = np.zeros_like(q_D)
    if not open_domains.size:
        return out_D
    # Python integers: the product of two 40-bit numbers does not fit 64 bits.
    scaled = [int(share) * total for share in q_D[open_domains]]
    open_total = sum(scaled) // total
    out_D[open_domains] = [value // open_total for value in scaled]
    missing = total - int(out_D.sum())
    by_remainder = sorted(range(open_domains.size), key=lambda at: -(scaled[at] % open_total))
    out_D[open_domains[by_remainder[:missing]]] += 1
    return out_D


def realized_error_bound(n_domains_in_use: int, *, same_domains: bool = True) -> float:
    """Return the most rows by which a domain's rows can exceed those requested.

    It holds at every step, for any shares. `raymix.sampling.allocate` has the proofs.

    Args:
        n_domains_in_use: n, the domains that ever had a share.
        same_domains: True: all of them have a share at every step, and the bound is
            1/2 + 1/3 + ... + 1/n. False: shares may be zero for a while, or end at a limit, and
            the bound is (n - 1) / 2.
    """
    if not same_domains:
        return max(0, n_domains_in_use - 1) / 2
    return math.fsum(1.0 / k for k in range(2, n_domains_in_use + 1))


def realized_shares(count_D: ArrayLike) -> Floats:
    """Return the share of each domain in the rows read, shape (D,); zeros before the first."""
    amount_D = np.asarray(count_D, dtype=np.float64)
    return amount_D / max(float(amount_D.sum()), 1.0)


def epochs_implied(shares_D: ArrayLike, tokens_D: ArrayLike, total_tokens: float) -> Floats:
    """Return how often each domain is read in a run, shape (D,), in passes over its tokens.

    Args:
        shares_D: Shares of tokens over the run, shape (D,), summing to 1.
        tokens_D: Tokens of each domain, shape (D,).
        total_tokens: Tokens of the run.
    """
    requested_D = np.asarray(shares_D, dtype=np.float64) * total_tokens
    available_D = np.asarray(tokens_D, dtype=np.float64)
    empty_D = np.where(requested_D > 0, np.inf, 0.0)
    return np.divide(requested_D, available_D, out=empty_D, where=available_D > 0)
