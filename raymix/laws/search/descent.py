"""Entropic descent over shares, with a lower bound that proves an optimum.

The objective is max_k f_k(r) + kl x KL(r || prior) over the shares within floors and caps. A
weighted sum of losses is a single row, K = 1; the maximum of several losses has one row each.

Step: with levels f_k and slopes g_k at r, the next shares minimize the model

    max_k [f_k + g_k . (s - r)] + kl KL(s || prior) + sigma KL(s || r),

exactly for one row (a softmax within limits). Relative entropy is the natural distance here: laws
are powers of shares, so at an optimum, where slopes are equal, their curvature is about 1 / share,
as is that of the entropy; small shares do not worsen the conditioning. (Mirror descent under
relative smoothness, Lu, Freund and Nesterov 2018; sigma by Barzilai and Borwein's rule, accepted
against the largest of the last values as in Grippo, Lampariello and Lucidi 1986.) For several rows
the model is solved in its dual, the weights q of the rows (`balance`).

Bound: for convex f_k, any weights q of the rows and any r,

    minimum >= min_s [sum_k q_k (f_k + g_k . (s - r)) + kl KL(s || prior)],

which is a sort (the Frank-Wolfe gap) or, with kl, again a softmax. For several rows the best q is
that of a linear program.

Shapes: A domains with a cap above 0, K rows of the objective.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from raymix.laws.search.balance import DualPoint, maximize_dual
from raymix.laws.search.feasible import Region
from raymix.laws.table import Floats

Rows = Callable[[Floats], tuple[Floats, Floats]]
"""Levels f, shape (K,), and slopes g, shape (K, A), at shares (A,); not finite where undefined."""

_NONMONOTONE_WINDOW = 8
_SUFFICIENT_DECREASE = 1e-4
# Relative rounding error of values. Smaller changes still follow the slopes: the gap is of first
# order in the distance to the optimum, the value of second.
_ROUNDING = 1e-12
_MAX_TRIALS = 60
_LP_BOUND_INTERVAL = 10  # steps; a linear program costs much more than a step
# Steps without a decrease of the gap by a tenth. Steps of several rows cost a hundred times more.
_MAX_STALLED_STEPS = 300
_MAX_STALLED_STEPS_MINIMAX = 40


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descent:
    """Result of a descent."""

    share_A: Floats
    """The best shares of all steps, shape (A,)."""
    value: float
    """The objective at these shares."""
    bound: float
    """Lower bound of the objective, valid if all rows are convex."""
    steps: int
    """Number of steps."""


@dataclass(slots=True)
class _Point:
    share_A: Floats
    level_K: Floats
    slope_KA: Floats
    value: float


@dataclass(slots=True)
class Descender:
    """Minimizes the largest row over a region; see the module docstring."""

    rows: Rows
    """The rows of the objective."""
    region: Region
    """The allowed shares."""
    kl: float = 0.0
    """Weight of the relative entropy to the prior."""
    log_prior_A: Floats | None = None
    """Logs of the prior, shape (A,), finite; required with `kl`."""
    tolerance: float = 1e-9
    """Relative gap at which the descent stops."""
    max_steps: int = 2000
    """Largest number of steps."""
    _q_K: Floats = field(init=False, default_factory=lambda: np.ones(1))

    def run(self, start_A: Floats, *, convex: bool) -> Descent:
        """Return the result of the descent from `start_A`, shares above 0 with finite rows.

        It stops at a small gap: for convex rows to the best bound of all points, else to the bound
        at the current point, which is then stationary.
        """
        point = self._evaluate(start_A)
        self._q_K = np.full(point.level_K.size, 1 / point.level_K.size)
        best, bound = point, -np.inf
        recent = deque([point.value], maxlen=_NONMONOTONE_WINDOW)
        sigma = self._first_sigma(point)
        gap, last_progress, step = np.inf, 0, 0
        max_stalled = _MAX_STALLED_STEPS if point.level_K.size == 1 else _MAX_STALLED_STEPS_MINIMAX
        for step in range(self.max_steps):
            # The step comes before the bound: it also computes the row weights q of the bound.
            # Values may rise for some steps (nonmonotone search); a stalling descent may cycle, so
            # it must then decrease.
            stalling = step - last_progress > max_stalled // 8
            next_step = self._step(point, sigma, point.value if stalling else max(recent))
            point_bound = self._lower_bound(
                point, best.value, exact=next_step is None or step % _LP_BOUND_INTERVAL == 0
            )
            bound = max(bound, point_bound)
            new_gap = best.value - bound if convex else point.value - point_bound
            gap, last_progress = (new_gap, step) if new_gap < 0.9 * gap else (gap, last_progress)
            if (
                next_step is None
                or self._done(new_gap, best.value)
                or step - last_progress > max_stalled
            ):
                break
            new, sigma = next_step
            sigma = self._next_sigma(point, new, sigma)
            point = new
            best = point if point.value <= best.value else best
            recent.append(point.value)
        return Descent(share_A=best.share_A, value=best.value, bound=bound, steps=step)

    def _done(self, gap: float, value: float) -> bool:
        return gap <= self.tolerance * max(abs(value), 1e-300)

    def _evaluate(self, share_A: Floats) -> _Point:
        level_K, slope_KA = self.rows(share_A)
        # An infinite value makes `_step` reject the trial and shorten the step.
        if not (np.isfinite(level_K).all() and np.isfinite(slope_KA).all()):
            return _Point(share_A, level_K, slope_KA, np.inf)
        value = float(level_K.max()) + self._prior_term(share_A)
        return _Point(share_A, level_K, slope_KA, value)

    def _prior_term(self, share_A: Floats) -> float:
        """Return kl x KL(share || prior)."""
        if self.log_prior_A is None or not self.kl:
            return 0.0
        used = share_A > 0  # 0 log 0 is 0 in the limit, NaN in floating point
        return self.kl * float(
            (share_A[used] * (np.log(share_A[used]) - self.log_prior_A[used])).sum()
        )

    def _entropic_minimum(self, cost_A: Floats, sigma: float, log_share_A: Floats | None) -> Floats:
        """Return argmin_s cost . s + kl KL(s || prior) + sigma KL(s || exp(log_share)), (A,)."""
        # Two entropies of one kind add: a softmax with the mean of the logs, weighted by kl, sigma.
        total = -cost_A
        if self.kl and self.log_prior_A is not None:
            total = total + self.kl * self.log_prior_A
        if log_share_A is not None:
            total = total + sigma * log_share_A
        return self.region.project(total / (self.kl + sigma))

    def _lower_bound(self, point: _Point, best: float, *, exact: bool) -> float:
        """Return a lower bound of the objective from the linear model at a point.

        With `exact` and several rows, a linear program improves a bound that does not prove `best`.
        """
        slope_A = self._q_K @ point.slope_KA
        best_A = (
            self._entropic_minimum(slope_A, 0.0, None) if self.kl else self.region.vertex(slope_A)
        )
        level = float(self._q_K @ point.level_K)
        bound = level + float(slope_A @ (best_A - point.share_A)) + self._prior_term(best_A)
        if not exact or self._q_K.size == 1 or self._done(best - bound, best):
            return bound
        return max(bound, self._lp_bound(point))

    def _lp_bound(self, point: _Point) -> float:
        """Return min over s of max_k [f_k + g_k . (s - r)], by a linear program.

        The relative entropy to the prior is replaced by its tangent, a lower bound of it.
        """
        prior_slope_A = np.zeros(point.share_A.size)
        if self.kl and self.log_prior_A is not None:
            prior_slope_A = self.kl * (np.log(np.maximum(point.share_A, 1e-300)) - self.log_prior_A)
        slope_KA = point.slope_KA + prior_slope_A
        level_K = point.level_K + self._prior_term(point.share_A)
        # HiGHS has absolute tolerances of 1e-7: levels are divided by the largest.
        scale = float(np.abs(level_K).max()) or 1.0
        solution = linprog(
            np.append(np.zeros(point.share_A.size), 1.0),
            A_ub=np.hstack([slope_KA / scale, -np.ones((level_K.size, 1))]),
            b_ub=(slope_KA @ point.share_A - level_K) / scale,
            A_eq=np.append(np.ones(point.share_A.size), 0.0)[None],
            b_eq=[1.0],
            bounds=[*zip(self.region.low_A, self.region.high_A, strict=True), (None, None)],
            method="highs",
        )
        if solution.status != 0:
            return -np.inf
        # Evaluated by the sort at the dual weights: valid for any q, so independent of the solver's
        # tolerances.
        q_K = np.maximum(-solution.ineqlin.marginals, 0)
        if not q_K.sum() > 0:
            return -np.inf
        q_K = q_K / q_K.sum()
        slope_A = q_K @ slope_KA
        moved_A = self.region.vertex(slope_A) - point.share_A
        return float(q_K @ level_K + slope_A @ moved_A)

    def _first_sigma(self, point: _Point) -> float:
        """Return the sigma at which the first step changes log shares by about 1."""
        slope_A = self._q_K @ point.slope_KA
        mean = float(point.share_A @ slope_A)
        spread = float(np.sqrt(point.share_A @ (slope_A - mean) ** 2))
        return max(spread, 1e-9 * abs(point.value), 1e-300)

    def _step(self, point: _Point, sigma: float, reference: float) -> tuple[_Point, float] | None:
        """Return the next point and its sigma; None where rounding hides any progress."""
        log_share_A = np.log(np.maximum(point.share_A, 1e-300))
        for _ in range(_MAX_TRIALS):
            share_A = self._model_minimum(point, sigma, log_share_A)
            tangent_K = point.level_K + point.slope_KA @ (share_A - point.share_A)
            predicted_decrease = point.value - float(tangent_K.max()) - self._prior_term(share_A)
            new = self._evaluate(share_A)
            allowed = (
                reference - _SUFFICIENT_DECREASE * predicted_decrease + _ROUNDING * abs(reference)
            )
            if predicted_decrease >= -_ROUNDING * abs(reference) and new.value <= allowed:
                if np.array_equal(share_A, point.share_A):
                    return None
                return new, sigma
            sigma *= 4
        return None

    def _model_minimum(self, point: _Point, sigma: float, log_share_A: Floats) -> Floats:
        if point.level_K.size == 1:
            return self._entropic_minimum(point.slope_KA[0], sigma, log_share_A)
        # All relative to the point: near the optimum, changes of 1e-12 keep their digits.
        level_K = point.level_K - point.level_K.max()
        prior_log_ratio_A = (
            log_share_A - self.log_prior_A
            if self.log_prior_A is not None
            else np.zeros(log_share_A.size)
        )
        current_A = np.exp(log_share_A)

        def best_response(q_K: Floats) -> DualPoint:
            slope_A = q_K @ point.slope_KA
            share_A = self._entropic_minimum(slope_A, sigma, log_share_A)
            moved_A = share_A - current_A
            ratio_A = moved_A / current_A
            # KL(s || r) as a sum of (1 + x) log(1 + x) - x with x = s / r - 1: terms of second
            # order, without the cancellation of s log(s / r). The clip keeps shares of 0 finite.
            log_ratio_A = np.log1p(np.maximum(ratio_A, -1 + 1e-16))
            entropy = (self.kl + sigma) * (
                current_A * ((1 + ratio_A) * log_ratio_A - ratio_A)
            ).sum()
            change = q_K @ level_K + (slope_A + self.kl * prior_log_ratio_A) @ moved_A + entropy
            return DualPoint(float(change), share_A, level_K + point.slope_KA @ moved_A)

        self._q_K, share_A = maximize_dual(
            best_response, point.slope_KA, self.region, self.kl + sigma, self._q_K
        )
        return share_A

    def _next_sigma(self, old: _Point, new: _Point, sigma: float) -> float:
        """Return the curvature along the last step, relative to that of the entropy."""
        # Barzilai-Borwein in the geometry of the entropy, whose gradient is the log of the shares.
        moved_A = new.share_A - old.share_A
        positive = (new.share_A > 0) & (old.share_A > 0)
        curvature = float(self._q_K @ (new.slope_KA - old.slope_KA) @ moved_A)
        entropy = float(moved_A[positive] @ np.log(new.share_A[positive] / old.share_A[positive]))
        if not (curvature > 0 and entropy > 0):
            return sigma / 8  # concave or flat along the step: a longer one
        return float(np.clip(curvature / entropy, sigma / 100, sigma * 100))
