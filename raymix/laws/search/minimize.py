"""The best shares under any law: proved where the law is convex, by many starts where it is not.

Shapes: R rows, D domains, V targets, A domains that may have a share, K rows of the objective.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from raymix.errors import LawError
from raymix.laws.base import Law
from raymix.laws.search.descent import Descender, Descent
from raymix.laws.search.feasible import Problem, Region, feasible
from raymix.laws.search.objective import Objective, Optimum
from raymix.laws.search.separable import HasPowers, SeparableOptimum, separable_optimum
from raymix.laws.table import Floats

STARTS = 16
"""Starts of a law that is not convex."""
_TOLERANCE = 1e-9
_TOLERANCE_MINIMAX = 1e-7
_AGREEING = 1e-6
_STEPS_PER_START = 300
_DRAWS = 512
_MAX_CORNERS = 256
_TRACE = 1e-9
# A share this much beyond the largest of any run is said to be beyond: relative, and in shares.
_BEYOND = 0.05
_BEYOND_LEAST = 1e-3


def minimize(law: Law, objective: Objective, *, starts: int = STARTS) -> Optimum:
    """Return the best shares under a law, and what proves or supports that there are none better.

    A law that is one power of each target's own share (`HasPowers`) is solved exactly. For any
    other convex one the gap bounds how much better any allowed shares could be (see
    `raymix.laws.search.descent`); it is sought at 1e-9 of the value, 1e-7 for minimax, and reported
    as reached. For any other law the best of `starts` descents is returned, without a gap. The same
    law and objective give the same shares.

    Args:
        law: A fitted law.
        objective: What to minimize, within which limits.
        starts: Descents for a law that is not convex, >= 1.

    Raises:
        LawError: If the objective cannot be, or the law predicts no finite losses where it is
            asked.
    """
    if starts < 1:
        raise LawError.at("starts", starts, "no number of descents", allowed="Allowed: 1 or more")
    task = _DescentTask(law, feasible(objective, law.domains, law.targets))
    exact = _closed_form(law, task.problem)
    if exact is not None:
        share_D, gap = exact.share_D, exact.gap
        return optimum_at(law, task.problem, share_D, method="closed form", gap=gap)
    found = task.descend(task.first(), convex=law.convex)
    if law.convex and found.bound <= found.value + _AGREEING * abs(found.value):
        share_D, value = task.tidy(found)
        gap = max(value - found.bound, 0.0)
        return optimum_at(law, task.problem, share_D, method="convex", gap=gap)
    descents = [found if not law.convex else task.descend(task.first(), convex=False)]
    descents += [task.descend(start_A, convex=False) for start_A in task.starts(starts - 1)]
    best = min(descents, key=lambda descent: descent.value)
    near = best.value + _AGREEING * abs(best.value)
    optimum = optimum_at(law, task.problem, task.tidy(best)[0], method="restarts", gap=None)
    agreeing = sum(descent.value <= near for descent in descents)
    return replace(optimum, restarts=len(descents), agreeing=agreeing)


def optimum_at(
    law: Law,
    asked: Problem,
    share_D: Floats,
    *,
    method: str,
    gap: float | None,
) -> Optimum:
    """Return an optimum at shares, shape (D,), with the law's losses there and its warnings."""
    step_R = None if asked.horizon is None else np.array([asked.horizon])
    with np.errstate(all="ignore"):
        loss_V = law.predict(share_D[None], step_R)[0]
    _check_finite(loss_V, share_D, asked)
    warnings = _beyond(law, share_D)
    for which_V, what in (
        (loss_V <= 0, "losses of 0 or less"),
        (~np.isfinite(loss_V), "no finite losses"),
    ):
        names = [asked.targets[at] for at in np.flatnonzero(which_V)]
        if names:
            warnings += (f"{what} are predicted for {', '.join(names[:5])}",)
    return Optimum(
        shares=dict(zip(asked.domains, share_D.tolist(), strict=True)),
        losses=dict(zip(asked.targets, loss_V.tolist(), strict=True)),
        value=asked.value(loss_V, share_D),
        gap=gap,
        method=method,
        warnings=warnings,
    )


def _closed_form(law: Law, asked: Problem) -> SeparableOptimum | None:
    """Return the exact optimum where the objective is one power of each domain's share."""
    powers = law.powers(asked.horizon) if isinstance(law, HasPowers) else None
    if powers is None or asked.minimax or asked.kl:
        return None
    own_K = powers.own_V[asked.counted_V]
    if np.unique(own_K).size < own_K.size or not (asked.region.high_A + powers.offset > 0).all():
        return None
    scale_D, exponent_D = np.zeros(len(asked.domains)), np.zeros(len(asked.domains))
    scale_D[own_K] = (asked.weight_V * powers.scale_V)[asked.counted_V]
    exponent_D[own_K] = powers.exponent_V[asked.counted_V]
    offset_D = np.full(scale_D.size, powers.offset)
    return separable_optimum(scale_D, exponent_D, asked.region, offset_D=offset_D)


def _beyond(law: Law, share_D: Floats) -> tuple[str, ...]:
    """Return a sentence on the shares that are beyond what any run of the law's table had."""
    over_D = share_D - law.most_D * (1 + _BEYOND) - _BEYOND_LEAST
    far = [at for at in np.argsort(-over_D).tolist() if over_D[at] > 0]
    if not far:
        return ()
    named = ", ".join(
        f"{law.domains[at]} ({share_D[at]:.3g}, at most {law.most_D[at]:.3g})" for at in far[:5]
    )
    more = f" and {len(far) - 5} more" if len(far) > 5 else ""
    return (f"shares beyond what any run had: {named}{more}; cap them, or add runs there",)


def _check_finite(loss_V: Floats, share_D: Floats, asked: Problem) -> None:
    bad = np.flatnonzero(asked.counted_V & ~np.isfinite(loss_V))
    if bad.size:
        where = f"law.predict({asked.targets[bad[0]]})"
        absent = [asked.domains[at] for at in np.flatnonzero(share_D <= 0)]
        capped = f"; without a share there: {', '.join(absent[:5])}" if absent else ""
        raise LawError.at(
            where,
            float(loss_V[bad[0]]),
            f"not finite at shares that the objective allows{capped}",
            fix="Give floors, raise caps of 0, or fit another law",
        )


class _DescentTask:
    """A law and a checked objective, as rows over the domains that may have a share."""

    def __init__(self, law: Law, asked: Problem) -> None:
        self.problem = asked
        self._law = law
        self._live_D = asked.region.high_A > 0
        self._region = Region(
            low_A=asked.region.low_A[self._live_D], high_A=asked.region.high_A[self._live_D]
        )

    def rows(self, share_A: Floats) -> tuple[Floats, Floats]:
        """Return levels, shape (K,), and slopes, shape (K, A), of the objective's rows."""
        with np.errstate(all="ignore"):  # steps to where a law is not finite are taken back
            loss_V, slope_VD = self._law.share_gradient(self._full(share_A), self.problem.horizon)
            counted_V = self.problem.counted_V
            weight_K = self.problem.weight_V[counted_V]
            level_K = weight_K * loss_V[counted_V]
            slope_KA = weight_K[:, None] * slope_VD[counted_V][:, self._live_D]
        if self.problem.minimax:
            return level_K, slope_KA
        return level_K.sum(keepdims=True), slope_KA.sum(axis=0, keepdims=True)

    def first(self) -> Floats:
        """Return the start nearest to the prior, else to equal shares; finite, shape (A,)."""
        prior_D = self.problem.prior_D
        size = int(self._live_D.sum())
        wanted_A = np.full(size, 1 / size) if prior_D is None else prior_D[self._live_D]
        start_A = self._region.center(wanted_A)
        with np.errstate(all="ignore"):
            horizon = self.problem.horizon
            loss_V, slope_VD = self._law.share_gradient(self._full(start_A), horizon)
        _check_finite(loss_V, self._full(start_A), self.problem)
        if not np.isfinite(slope_VD[self.problem.counted_V][:, self._live_D]).all():
            raise LawError.at(
                "law.share_gradient",
                "not finite",
                "the law has no finite slope at shares above 0",
                fix="Fit another law",
            )
        return start_A

    def descend(self, start_A: Floats, *, convex: bool) -> Descent:
        """Return where a descent ends."""
        prior_D = self.problem.prior_D
        uses_prior = self.problem.kl > 0 and prior_D is not None
        descender = Descender(
            self.rows,
            self._region,
            kl=self.problem.kl,
            log_prior_A=np.log(prior_D[self._live_D]) if uses_prior else None,
            tolerance=_TOLERANCE_MINIMAX if self.problem.minimax else _TOLERANCE,
            most_steps=2000 if convex else _STEPS_PER_START,
        )
        return descender.run(start_A, convex=convex)

    def starts(self, n_starts: int) -> list[Floats]:
        """Return up to so many different starts: equal shares, and the best of two kinds.

        One kind leans to a single domain each, the other is drawn from Dirichlet distributions
        from sparse to even; both are ranked by what the law predicts for them.
        """
        size = self._region.low_A.size
        even_A = np.full(size, 1 / size)
        draws = np.random.default_rng(0)
        sparse_RA = draws.dirichlet(np.full(size, max(0.3, 2 / size)), _DRAWS // 2)
        dense_RA = draws.dirichlet(np.ones(size), _DRAWS // 2)
        corners_RA = 0.2 * even_A + 0.8 * np.eye(size)[:_MAX_CORNERS]
        ranked = [self._ranked(corners_RA), self._ranked(np.vstack([sparse_RA, dense_RA]))]
        chosen = [self._region.center(even_A)] if self.problem.prior_D is not None else []
        for pair in zip(*ranked, strict=False):
            chosen.extend(pair)
        chosen.extend(max(ranked, key=len)[min(map(len, ranked)) :])
        return chosen[:n_starts]

    def _ranked(self, wanted_RA: Floats) -> list[Floats]:
        """Return the allowed shares nearest to each row where losses are finite, best first."""
        share_RA = np.stack([self._region.center(row_A) for row_A in wanted_RA])
        share_RD = np.zeros((len(share_RA), self._live_D.size))
        share_RD[:, self._live_D] = share_RA
        horizon = self.problem.horizon
        step_R = None if horizon is None else np.full(len(share_RD), horizon)
        with np.errstate(all="ignore"):
            loss_RV = self._law.predict(share_RD, step_R)
        value_R = np.array(
            [self.problem.value(*pair) for pair in zip(loss_RV, share_RD, strict=True)]
        )
        order = np.argsort(value_R, kind="stable")
        return [share_RA[at] for at in order if np.isfinite(value_R[at])]

    def tidy(self, found: Descent) -> tuple[Floats, float]:
        """Return shares, shape (D,), with traces put to the floor if that costs nothing."""
        low_A = self._region.low_A
        trace_A = (found.share_A - low_A < _TRACE) & (found.share_A > low_A)
        log_A = np.where(trace_A, -1e4, np.log(np.maximum(found.share_A, 1e-300)))
        full_D = self._full(self._region.nearest(log_A))
        with np.errstate(all="ignore"):
            loss_V, _ = self._law.share_gradient(full_D, self.problem.horizon)
        value = self.problem.value(loss_V, full_D)
        if value <= found.value + 1e-10 * abs(found.value):
            return full_D, value
        return self._full(found.share_A), found.value

    def _full(self, share_A: Floats) -> Floats:
        share_D = np.zeros(self._live_D.size)
        share_D[self._live_D] = share_A
        return share_D
