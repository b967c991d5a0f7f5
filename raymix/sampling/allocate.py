"""Allocation of a step's rows to domains: error diffusion with proved bounds.

The rule
--------
Every domain has a carry c_d: rows requested of it so far minus rows allocated. A step of
`budget` rows with shares q (summing to 1) first adds budget * q_d to every carry ("fill"), then
takes `budget` rows one at a time, always from the domain with the largest carry (the lowest
index among equals), lowering that carry by 1. Domains with a share of zero sit out: they get no
row and their carry stays as it is. There is no history beyond the carries, so new shares
hold from the step they start at, however long the old ones held.

Why the carries stay small
--------------------------
Let D domains start at zero; H_n = 1 + 1/2 + ... + 1/n. All sums of carries below are over the
carries after whole steps unless said otherwise; the sum over all domains is always 0.

Fact. Let M be the largest carry among the domains in use when a step ends. Nobody in use is
above M, and everybody the step took from is at M - 1 or higher: it was the largest when it was
last taken from, the largest never rises during the taking, and it lost 1.

*Above, while all D domains stay in use: c_d <= H_D - 1, for any weights, new ones every step.*
Let S_k be the largest mean of any k carries; S_D = 0. Claim: S_k <= H_D - H_k. It holds at the
start. Let K be the k largest after a step and J the domains outside K that the step took from,
m = |J|. All rows of the step came from K and J, and the fill gave them at most as many, so their
sum did not grow: at most (k + m) S_{k+m}(before). If m = 0 that is the claim. Else everyone in J
is at least M - 1 >= mean(K) - 1, so (k + m) mean(K) - m <= (k + m) S_{k+m}(before), that is
    mean(K) <= S_{k+m}(before) + m / (k + m) <= H_D - H_{k+m} + m / (k + m) <= H_D - H_k,
as m / (k + m) <= 1/(k+1) + ... + 1/(k+m). With k = 1: c_d <= H_D - 1 (8 domains: 1.72 rows).
(A "cup game": Dietz and Sleator 1987 prove a bound of this kind for pebbles. It is tight: in steps
of one row, give equal shares to the domains not yet taken from and next to nothing to the others;
the last one comes as near to H_D - 1 as one likes.)

*Below, while all D stay in use: c_d >= -(1 - 1/D).* Before each row is taken the carries sum to
at least 1, so the largest is at least 1/D, and taking lowers it by 1. Nothing else lowers one.

*When domains leave and return at will: |c_d| <= (D - 1) / 2.* Let G_k be the largest sum of any
k carries and g(k) = k (D - k) / 2. Claim: G_k <= g(k). Let K, J, m be as above, A the members of
K in use, a = |A|, and F the sum over the rest of K, frozen, so F <= g(k - a). If m = 0 or a = 0
the sum over K did not grow. Else let t = mean(A) <= M, so each of J is at least t - 1, and
F + a t + m (t - 1) <= g(k + m). Then
    sum(K) = F + a t <= [m g(k - a) + a g(k + m)] / (a + m) + a m / (a + m)
                      = g(k) - a m / 2 + a m / (a + m) <= g(k),
since g is a parabola with second difference -1 and a + m >= 2. Hence c_d <= g(1); and
c_d = -(sum of the others) >= -G_{D-1} >= -g(D - 1) = -(D - 1) / 2.

Limits
------
A domain with a row limit (`max_epochs`) that would be passed in a step gets exactly what is left
and its carry stays as it was: what was requested of it is *defined* as what it got. The rest of the
step, and all later ones, are shared by the others in proportion to their shares. So a limit is a
change of the domains in use, and the last bound covers it.

Arithmetic
----------
Carries and shares are int64 in units of 2**-40 rows, so what is requested is exact. A share
differs from the float it came from by up to 2**-40: one row in 10**12.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add, ge, sub

import numpy as np

from raymix.errors import CorpusError, RecipeError, format_problem
from raymix.sampling.closed_form import MAX_DOMAINS, closed_form
from raymix.sampling.shares import SHARE_BITS, Ints, restricted

NO_LIMIT = (1 << 63) - 1
"""The row limit of a domain without one."""
_FRACTION = (1 << SHARE_BITS) - 1
# Carries of all domains and one step must fit 63 bits.
_MAX_BUDGET = 1 << (62 - SHARE_BITS)
# Up to this many domains, loops over Python integers beat numpy's overhead per call.
_MAX_PYTHON_DOMAINS = 48
# Fewer steps than this repay no attempt at the closed form.
_MIN_CLOSED_FORM_STEPS = 12
_INDEX_BITS = 6


class Allocator:
    """Turns shares into whole rows, step by step; see the module's text for rule and bounds.

    Attributes:
        carry_D: Rows requested minus rows allocated, shape (D,), int64 in units of 2**-40 rows.
        count_D: Rows allocated so far, shape (D,), int64.
    """

    def __init__(
        self, n_domains: int, limit_D: Ints | None = None, *, names: Sequence[str] = ()
    ) -> None:
        self.carry_D = np.zeros(n_domains, dtype=np.int64)
        self.count_D = np.zeros(n_domains, dtype=np.int64)
        self.limit_D = None if limit_D is None else np.asarray(limit_D, dtype=np.int64)
        self._names = names

    def allocate(self, q_D: Ints, budget: int, *, step: int = 0) -> Ints:
        """Return the rows of each domain in one step, shape (D,), summing to `budget`."""
        return self.allocate_steps(q_D, budget, 1, first_step=step)[0]

    def allocate_steps(self, q_D: Ints, budget: int, n_steps: int, *, first_step: int = 0) -> Ints:
        """Return the rows of each domain in `n_steps` steps of the same shares, shape (S, D).

        Where the limits leave rows for some of the steps only, the result is that much shorter.

        Args:
            q_D: Shares from `fixed_point`, shape (D,).
            budget: Rows per step, >= 1.
            n_steps: Steps to allocate.
            first_step: Number of the first one, for messages.

        Raises:
            CorpusError: If the limits leave too few rows for even the first step.
            RecipeError: If `budget` is too large for 64-bit arithmetic.
        """
        if not 1 <= budget <= _MAX_BUDGET - self.count_D.size:
            raise RecipeError.at(
                "data.rows_per_step", budget, f"not between 1 and {_MAX_BUDGET - self.count_D.size}"
            )
        counts_SD = np.zeros((n_steps, self.count_D.size), dtype=np.int64)
        done = 0
        while done < n_steps:
            open_q_D = self._open_shares(q_D)
            # Each path takes over where the one before it no longer holds; all give the same rows.
            done += self._run_closed(open_q_D, budget, counts_SD[done:])
            done += self._run_few(open_q_D, budget, counts_SD[done:])
            if done < n_steps:
                if not self._step(open_q_D, budget, counts_SD[done]):
                    break
                done += 1
        if n_steps and not done:
            raise CorpusError(self._exhausted(q_D, budget, first_step))
        return counts_SD[:done]

    def copy(self) -> Allocator:
        """Return an independent allocator in the same state."""
        twin = Allocator(self.count_D.size, self.limit_D, names=self._names)
        twin.carry_D = self.carry_D.copy()
        twin.count_D = self.count_D.copy()
        return twin

    def _open_shares(self, q_D: Ints) -> Ints:
        if self.limit_D is None:
            return q_D
        open_D = self.count_D < self.limit_D
        return q_D if open_D[q_D > 0].all() else restricted(q_D, open_D)

    def _run_closed(self, q_D: Ints, budget: int, counts_SD: Ints) -> int:
        """Fill rows of `counts_SD` while the closed form holds; return how many."""
        active = np.flatnonzero(q_D)
        if len(counts_SD) < _MIN_CLOSED_FORM_STEPS or not 0 < active.size <= MAX_DOMAINS:
            return 0
        request = budget * q_D[active]
        counts = closed_form(self.carry_D[active], request, len(counts_SD))
        if self.limit_D is not None:
            # A step in which a domain reaches its limit is left to `_step`, which shares the rest.
            left = (self.limit_D - self.count_D)[active]
            counts = counts[(counts.cumsum(axis=0) < left).all(axis=1)]
        total = counts.sum(axis=0)
        counts_SD[: len(counts), active] = counts
        self.carry_D[active] += len(counts) * request - (total << SHARE_BITS)
        self.count_D[active] += total
        return len(counts)

    def _run_few(self, q_D: Ints, budget: int, counts_SD: Ints) -> int:
        """Fill rows of `counts_SD` while the plain case lasts; return how many."""
        active = np.flatnonzero(q_D)
        if not 0 < active.size <= _MAX_PYTHON_DOMAINS:
            return 0
        request = [budget * share for share in q_D[active].tolist()]
        carry = self.carry_D[active].tolist()
        left = None
        if self.limit_D is not None:
            left = (self.limit_D - self.count_D)[active].tolist()
        steps: list[list[int]] = []
        for _ in range(len(counts_SD)):
            filled = list(map(add, carry, request))
            counts = _pick_few(filled, budget)
            if counts is None or (left is not None and any(map(ge, counts, left))):
                break
            carry = [
                value - (count << SHARE_BITS) for value, count in zip(filled, counts, strict=True)
            ]
            left = None if left is None else list(map(sub, left, counts))
            steps.append(counts)
        if steps:
            counts_SD[: len(steps), active] = steps
            self.carry_D[active] = carry
            self.count_D += counts_SD[: len(steps)].sum(axis=0)
        return len(steps)

    def _step(self, q_D: Ints, budget: int, count_D: Ints) -> bool:
        """Write one step to `count_D`, limits respected; return False if rows ran out."""
        rest_D = None if self.limit_D is None else self.limit_D - self.count_D
        open_D = np.ones(q_D.size, dtype=np.bool_)
        share_D = q_D
        while True:
            active = np.flatnonzero(share_D)
            if not active.size:
                return False
            filled = self.carry_D[active] + budget * share_D[active]
            counts = _pick(filled, budget)
            # Domains that would pass their limit get what is left; the others take the step again.
            if rest_D is None or (counts <= rest_D[active]).all():
                break
            closing = active[counts > rest_D[active]]
            count_D[closing] = rest_D[closing]
            budget -= int(rest_D[closing].sum())
            open_D[closing] = False
            share_D = restricted(q_D, open_D)
        count_D[active] = counts
        self.carry_D[active] = filled - (counts << SHARE_BITS)
        self.count_D += count_D
        return True

    def _exhausted(self, q_D: Ints, budget: int, step: int) -> str:
        used = np.flatnonzero(q_D)
        names = [self._names[at] if self._names else f"#{at}" for at in used[:8].tolist()]
        return format_problem(
            "step",
            step,
            (
                f"the domains with a share ({', '.join(names)}{', ...' if used.size > 8 else ''}) "
                f"have reached their limits and cannot fill a batch of {budget} rows"
            ),
            fix="Raise data.max_epochs, train fewer tokens, or give other domains a share",
        )


def _pick_few(filled: list[int], budget: int) -> list[int] | None:
    """Return the rows taken from each carry, or None where `_pick` must look deeper."""
    counts = [value >> SHARE_BITS if value > 0 else 0 for value in filled]
    left = budget - sum(counts)
    if left:
        # One integer per candidate, fraction above index, sorts faster than tuples do.
        last = (1 << _INDEX_BITS) - 1
        ranked = [
            (value & _FRACTION) << _INDEX_BITS | last - at
            for at, value in enumerate(filled)
            if value >= 0
        ]
        if not 0 < left <= len(ranked):
            return None
        ranked.sort()
        for code in ranked[-left:]:
            counts[last - (code & last)] += 1
    return counts


def _pick(filled: Ints, budget: int) -> Ints:
    """Return how many rows are taken from each carry, `budget` in all, the largest first.

    A carry x offers the rows x, x - 1, x - 2, ...; the `budget` highest of all offers are taken.
    With `level` the whole number at or below the lowest of them, each carry gives its offers of
    level + 1 and more, and at most one from [level, level + 1): there the highest fractions win.
    """
    whole = filled >> SHARE_BITS
    level = 0
    counts = np.maximum(whole, 0)
    left = budget - int(counts.sum())
    if not 0 <= left <= np.count_nonzero(whole >= 0):
        level = _level(whole, budget)
        counts = np.maximum(whole - level, 0)
        left = budget - int(counts.sum())
    if left:
        offering = np.flatnonzero(whole >= level)
        counts[offering[_largest(filled[offering] & _FRACTION, left)]] += 1
    return counts


def _level(whole: Ints, budget: int) -> int:
    """Return the highest level at or above which the carries offer `budget` rows."""
    above = int(whole.max()) + 1
    reached = above - budget
    while above - reached > 1:
        middle = (above + reached) // 2
        if int(np.maximum(whole - middle + 1, 0).sum()) >= budget:
            reached = middle
        else:
            above = middle
    return reached


def _largest(values: Ints, n: int) -> Ints:
    """Return the positions of the `n` largest values, the lowest positions among equals."""
    # Partition and not sort: thousands of domains, a few rows. Ties go by index, or the result
    # would depend on the platform's partition.
    threshold = np.partition(values, values.size - n)[values.size - n]
    higher = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)
    return np.concatenate([higher, equal[: n - higher.size]])
