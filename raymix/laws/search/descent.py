"""Minimizing predicted losses over shares: entropic steps, and the bound that proves an optimum.

The objective is max_k f_k(r) + kl x KL(r || prior) over the shares within floors and caps. A
weighted sum of losses is one row k = 1; the worst of several is one row each.

One step: with levels f_k and slopes g_k at r, the next shares minimize the model

    max_k [f_k + g_k . (s - r)] + kl KL(s || prior) + sigma KL(s || r),

exactly for one row (a softmax within limits). Relative entropy is the natural distance here:
laws are powers of shares, so at an optimum, where slopes are equal, their curvature is about
1 / share, as that of the entropy is; conditioning does not suffer from small shares. (Mirror
descent under relative smoothness, Lu, Freund and Nesterov 2018; sigma by Barzilai and Borwein's
rule, accepted against the worst of the last values as in Grippo, Lampariello and Lucidi 1986.)
For several rows the model is solved in its dual: weights q of the rows.

The bound: for convex f_k, any weights q of the rows and any r,

    minimum >= min_s [sum_k q_k (f_k + g_k . (s - r)) + kl KL(s || prior)],

which is a sort (Frank and Wolfe's gap) or, with kl, again a softmax. For several rows the best q
is that of a linear programme.

Shapes: A domains that may have a share, K rows, D domains, V targets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from raymix.laws.search.balance import BalanceResult, balanced
from raymix.laws.search.feasible import Region
from raymix.laws.table import Floats

Rows = Callable[[Floats], tuple[Floats, Floats]]
"""Levels f, shape (K,), and slopes g, shape (K, A), at shares (A,); not finite where undefined."""

_MEMORY = 8
_DECREASE = 1e-4
# Values are this exact at best. Below it slopes go on telling the way: the gap is of first order
# in the distance to the optimum, the value of second.
_ROUNDING = 1e-12
_MAX_TRIALS = 60
_EXACT = 10
# Steps without a gap smaller by a tenth; those of several rows cost a hundred times as much.
_PATIENCE = 300
_PATIENCE_ROWS = 40


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descent:
    """Where a descent ended."""

    share_A: Floats
    """The best shares met, shape (A,)."""
    value: float
    """The objective there."""
    bound: float
    """The objective is nowhere below this, if every row is convex."""
    steps: int
    """Steps taken."""


@dataclass(slots=True)
class _Point:
    share_A: Floats
    level_K: Floats
    slope_KA: Floats
    value: float


@dataclass(slots=True)
class Descender:
    """Minimizes rows over a region; see the module's text."""

    rows: Rows
    """What to minimize the largest of."""
    region: Region
    """The allowed shares."""
    kl: float = 0.0
    """Weight of the relative entropy to the prior."""
    log_prior_A: Floats | None = None
    """Logs of the prior, shape (A,), finite; needed with `kl`."""
    tolerance: float = 1e-9
    """Stop at a gap of this times the value."""
    most_steps: int = 2000
    """Stop after so many steps in any case."""
    _q_K: Floats = field(init=False, default_factory=lambda: np.ones(1))

    def run(self, start_A: Floats, *, convex: bool) -> Descent:
        """Return where the descent from `start_A`, shares above 0 with finite rows, ends.

        It stops when the bound is reached: that of any point met for convex rows, else that of
        the point itself (it is stationary).
        """
        point = self._at(start_A)
        self._q_K = np.full(point.level_K.size, 1 / point.level_K.size)
        best, bound = point, -np.inf
        recent = deque([point.value], maxlen=_MEMORY)
        sigma = self._first_sigma(point)
        gap, since, step = np.inf, 0, 0
        patience = _PATIENCE if point.level_K.size == 1 else _PATIENCE_ROWS
        for step in range(self.most_steps):
            # The step also finds the weights of the rows that bound the objective best from here.
            # Values may rise for a while, but not in a circle.
            circling = step - since > patience // 8
            found = self._step(point, sigma, point.value if circling else max(recent))
            local = self._bound(point, best.value, exact=found is None or step % _EXACT == 0)
            bound = max(bound, local)
            now = best.value - bound if convex else point.value - local
            gap, since = (now, step) if now < 0.9 * gap else (gap, since)
            if found is None or self._done(now, best.value) or step - since > patience:
                break
            new, sigma = found
            sigma = self._next_sigma(point, new, sigma)
            point = new
            best = point if point.value <= best.value else best
            recent.append(point.value)
        return Descent(share_A=best.share_A, value=best.value, bound=bound, steps=step)

    def _done(self, gap: float, value: float) -> bool:
        return gap <= self.tolerance * max(abs(value), 1e-300)

    def _at(self, share_A: Floats) -> _Point:
        level_K, slope_KA = self.rows(share_A)
        if not (np.isfinite(level_K).all() and np.isfinite(slope_KA).all()):
            return _Point(share_A, level_K, slope_KA, np.inf)
        value = float(level_K.max()) + self._pull(share_A)
        return _Point(share_A, level_K, slope_KA, value)

    def _pull(self, share_A: Floats) -> float:
        """Return kl x KL(share || prior)."""
        if self.log_prior_A is None or not self.kl:
            return 0.0
        used = share_A > 0
        return self.kl * float(
            (share_A[used] * (np.log(share_A[used]) - self.log_prior_A[used])).sum()
        )

    def _soft(self, cost_A: Floats, sigma: float, log_A: Floats | None) -> Floats:
        """Return the shares that minimize cost . s + kl KL(s || prior) + sigma KL(s || exp log)."""
        total = -cost_A
        if self.kl and self.log_prior_A is not None:
            total = total + self.kl * self.log_prior_A
        if log_A is not None:
            total = total + sigma * log_A
        return self.region.nearest(total / (self.kl + sigma))

    def _bound(self, point: _Point, best: float, *, exact: bool) -> float:
        """Return a lower bound of the objective from the model at a point.

        With `exact` and several rows it is the best one if the usual does not prove `best` yet.
        """
        slope_A = self._q_K @ point.slope_KA
        best_A = self._soft(slope_A, 0.0, None) if self.kl else self.region.vertex(slope_A)
        level = float(self._q_K @ point.level_K)
        found = level + float(slope_A @ (best_A - point.share_A)) + self._pull(best_A)
        if not exact or self._q_K.size == 1 or self._done(best - found, best):
            return found
        return max(found, self._programme_bound(point))

    def _programme_bound(self, point: _Point) -> float:
        """Return min over s of max_k [f_k + g_k . (s - r)], by a linear programme.

        The relative entropy to the prior is replaced by its tangent, which lies below it.
        """
        pull_A = np.zeros(point.share_A.size)
        if self.kl and self.log_prior_A is not None:
            pull_A = self.kl * (np.log(np.maximum(point.share_A, 1e-300)) - self.log_prior_A)
        slope_KA = point.slope_KA + pull_A
        level_K = point.level_K + self._pull(point.share_A)
        size = float(np.abs(level_K).max()) or 1.0
        done = linprog(
            np.append(np.zeros(point.share_A.size), 1.0),
            A_ub=np.hstack([slope_KA / size, -np.ones((level_K.size, 1))]),
            b_ub=(slope_KA @ point.share_A - level_K) / size,
            A_eq=np.append(np.ones(point.share_A.size), 0.0)[None],
            b_eq=[1.0],
            bounds=[*zip(self.region.low_A, self.region.high_A, strict=True), (None, None)],
            method="highs",
        )
        if done.status != 0:
            return -np.inf
        # The dual weights give a bound by the sort, free of the solver's tolerances.
        q_K = np.maximum(-done.ineqlin.marginals, 0)
        if not q_K.sum() > 0:
            return -np.inf
        q_K = q_K / q_K.sum()
        slope_A = q_K @ slope_KA
        moved_A = self.region.vertex(slope_A) - point.share_A
        return float(q_K @ level_K + slope_A @ moved_A)

    def _first_sigma(self, point: _Point) -> float:
        """Return the sigma at which a first step changes log shares by about 1."""
        slope_A = self._q_K @ point.slope_KA
        mean = float(point.share_A @ slope_A)
        spread = float(np.sqrt(point.share_A @ (slope_A - mean) ** 2))
        return max(spread, 1e-9 * abs(point.value), 1e-300)

    def _step(self, point: _Point, sigma: float, worst: float) -> tuple[_Point, float] | None:
        """Return the next point and the sigma it took; None where rounding hides any progress."""
        log_A = np.log(np.maximum(point.share_A, 1e-300))
        for _ in range(_MAX_TRIALS):
            share_A = self._model_minimum(point, sigma, log_A)
            tangent_K = point.level_K + point.slope_KA @ (share_A - point.share_A)
            promised = point.value - float(tangent_K.max()) - self._pull(share_A)
            new = self._at(share_A)
            allowed = worst - _DECREASE * promised + _ROUNDING * abs(worst)
            if promised >= -_ROUNDING * abs(worst) and new.value <= allowed:
                if np.array_equal(share_A, point.share_A):
                    return None
                return new, sigma
            sigma *= 4
        return None

    def _model_minimum(self, point: _Point, sigma: float, log_A: Floats) -> Floats:
        if point.level_K.size == 1:
            return self._soft(point.slope_KA[0], sigma, log_A)
        # All relative to the point: near the optimum, changes of 1e-12 still have their digits.
        level_K = point.level_K - point.level_K.max()
        away_A = log_A - self.log_prior_A if self.log_prior_A is not None else np.zeros(log_A.size)
        here_A = np.exp(log_A)

        def reply(q_K: Floats) -> BalanceResult:
            slope_A = q_K @ point.slope_KA
            share_A = self._soft(slope_A, sigma, log_A)
            moved_A = share_A - here_A
            ratio_A = moved_A / here_A
            log_ratio_A = np.log1p(np.maximum(ratio_A, -1 + 1e-16))
            far = (self.kl + sigma) * (here_A * ((1 + ratio_A) * log_ratio_A - ratio_A)).sum()
            change = q_K @ level_K + (slope_A + self.kl * away_A) @ moved_A + far
            return BalanceResult(float(change), share_A, level_K + point.slope_KA @ moved_A)

        self._q_K, share_A = balanced(
            reply, point.slope_KA, self.region, self.kl + sigma, self._q_K
        )
        return share_A

    def _next_sigma(self, old: _Point, new: _Point, sigma: float) -> float:
        """Return the curvature along the last step, relative to that of the entropy."""
        moved_A = new.share_A - old.share_A
        both = (new.share_A > 0) & (old.share_A > 0)
        bent = float(self._q_K @ (new.slope_KA - old.slope_KA) @ moved_A)
        entropy = float(moved_A[both] @ np.log(new.share_A[both] / old.share_A[both]))
        if not (bent > 0 and entropy > 0):
            return sigma / 8
        return float(np.clip(bent / entropy, sigma / 100, sigma * 100))
