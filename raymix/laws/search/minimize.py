"""Optimal shares under a fitted law: closed form, convex descent with a bound, or restarts.

Shapes: R candidate mixtures, D domains, V targets, A domains with a cap above 0, K rows of the
objective (1, or for minimax one per weighted target).
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
"""Number of descents for a law that is not convex."""
_TOLERANCE = 1e-9
# The dual of a minimax step is solved to a hundredth of its decrease, so its gap ends higher.
_TOLERANCE_MINIMAX = 1e-7
_VALUE_TOLERANCE = 1e-6  # relative; values this close count as equal
_STEPS_PER_START = 300
_CANDIDATE_DRAWS = 512
_MAX_CORNERS = 256
# Entropic steps approach a floor but never reach it.
_TRACE_SHARE = 1e-9
# A share larger by both than the largest of any run is extrapolated: relative, and in shares.
_EXTRAPOLATION_RELATIVE = 0.05
_EXTRAPOLATION_SHARE = 1e-3


def minimize(law: Law, objective: Objective, *, starts: int = STARTS) -> Optimum:
    """Return the optimal shares under a law, with a bound on the gap where the law is convex.

    A law with one power of a single share per target (`HasPowers`) is solved exactly. For another
    convex law the gap bounds how much better any allowed shares could be (see
    `raymix.laws.search.descent`); the target is 1e-9 of the value, 1e-7 for minimax, and the gap
    reached is reported. For any other law the best of `starts` descents is returned, without a gap.
    Equal laws and objectives give equal shares.

    Args:
        law: A fitted law.
        objective: The objective and the limits of the shares.
        starts: Number of descents for a law that is not convex, >= 1.

    Raises:
        LawError: If the objective is invalid, or the predicted losses are not finite.
    """
    if starts < 1:
        raise LawError.at(
            "starts", starts, "not a number of descents", allowed="Allowed: 1 or more"
        )
    task = _DescentTask(law, feasible(objective, law.domains, law.targets))
    exact = _closed_form(law, task.problem)
    if exact is not None:
        share_D, gap = exact.share_D, exact.gap
        return optimum_at(law, task.problem, share_D, method="closed form", gap=gap)
    descent = task.descend(task.prior_start(), convex=law.convex)
    # A bound above the value disproves convexity: the law claims it but is not. Then as below.
    if law.convex and descent.bound <= descent.value + _VALUE_TOLERANCE * abs(descent.value):
        share_D, value = task.snap_to_floors(descent)
        gap = max(value - descent.bound, 0.0)
        return optimum_at(law, task.problem, share_D, method="convex", gap=gap)
    descents = [descent if not law.convex else task.descend(task.prior_start(), convex=False)]
    descents += [task.descend(start_A, convex=False) for start_A in task.starts(starts - 1)]
    best = min(descents, key=lambda descent: descent.value)
    max_value = best.value + _VALUE_TOLERANCE * abs(best.value)
    optimum = optimum_at(
        law, task.problem, task.snap_to_floors(best)[0], method="restarts", gap=None
    )
    agreeing = sum(descent.value <= max_value for descent in descents)
    return replace(optimum, restarts=len(descents), agreeing=agreeing)


def optimum_at(
    law: Law,
    problem: Problem,
    share_D: Floats,
    *,
    method: str,
    gap: float | None,
) -> Optimum:
    """Return the optimum record at given shares, shape (D,), with losses and warnings."""
    step_R = None if problem.horizon is None else np.array([problem.horizon])
    with np.errstate(all="ignore"):
        loss_V = law.predict(share_D[None], step_R)[0]
    _check_finite(loss_V, share_D, problem)
    warnings = _extrapolation_warning(law, share_D)
    for mask_V, description in (
        (loss_V <= 0, "losses of 0 or less"),
        (~np.isfinite(loss_V), "no finite losses"),
    ):
        names = [problem.targets[at] for at in np.flatnonzero(mask_V)]
        if names:
            warnings += (f"{description} are predicted for {', '.join(names[:5])}",)
    return Optimum(
        shares=dict(zip(problem.domains, share_D.tolist(), strict=True)),
        losses=dict(zip(problem.targets, loss_V.tolist(), strict=True)),
        value=problem.value(loss_V, share_D),
        gap=gap,
        method=method,
        warnings=warnings,
    )


def _closed_form(law: Law, problem: Problem) -> SeparableOptimum | None:
    """Return the exact optimum if the objective is a sum of one power per domain, else None."""
    powers = law.powers(problem.horizon) if isinstance(law, HasPowers) else None
    if powers is None or problem.minimax or problem.kl:
        return None
    # Two targets with one own domain would be two powers of one share, without a closed form.
    own_V = powers.own_V[problem.active_V]
    if np.unique(own_V).size < own_V.size or not (problem.region.high_A + powers.offset > 0).all():
        return None
    scale_D, exponent_D = np.zeros(len(problem.domains)), np.zeros(len(problem.domains))
    scale_D[own_V] = (problem.weight_V * powers.scale_V)[problem.active_V]
    exponent_D[own_V] = powers.exponent_V[problem.active_V]
    offset_D = np.full(scale_D.size, powers.offset)
    return separable_optimum(scale_D, exponent_D, problem.region, offset_D=offset_D)


def _extrapolation_warning(law: Law, share_D: Floats) -> tuple[str, ...]:
    """Return a warning on shares larger than in any run of the training table, if there are any."""
    over_D = share_D - law.max_share_D * (1 + _EXTRAPOLATION_RELATIVE) - _EXTRAPOLATION_SHARE
    extrapolated = [at for at in np.argsort(-over_D).tolist() if over_D[at] > 0]
    if not extrapolated:
        return ()
    named = ", ".join(
        f"{law.domains[at]} ({share_D[at]:.3g}, at most {law.max_share_D[at]:.3g})"
        for at in extrapolated[:5]
    )
    remainder = f" and {len(extrapolated) - 5} more" if len(extrapolated) > 5 else ""
    return (f"shares beyond what any run had: {named}{remainder}; cap them, or add runs there",)


def _check_finite(loss_V: Floats, share_D: Floats, problem: Problem) -> None:
    invalid = np.flatnonzero(problem.active_V & ~np.isfinite(loss_V))
    if invalid.size:
        where = f"law.predict({problem.targets[invalid[0]]})"
        zero_domains = [problem.domains[at] for at in np.flatnonzero(share_D <= 0)]
        zero_text = (
            f"; without a share there: {', '.join(zero_domains[:5])}" if zero_domains else ""
        )
        raise LawError.at(
            where,
            float(loss_V[invalid[0]]),
            f"not finite at shares that the objective allows{zero_text}",
            fix="Give floors, raise caps of 0, or fit another law",
        )


class _DescentTask:
    """A law and a validated objective as rows over the A domains with a cap above 0.

    Domains with a cap of 0 are removed: entropic steps need logs of all shares.
    """

    def __init__(self, law: Law, problem: Problem) -> None:
        self.problem = problem
        self._law = law
        self._allowed_D = problem.region.high_A > 0
        self._region = Region(
            low_A=problem.region.low_A[self._allowed_D],
            high_A=problem.region.high_A[self._allowed_D],
        )

    def rows(self, share_A: Floats) -> tuple[Floats, Floats]:
        """Return levels, shape (K,), and slopes, shape (K, A), of the objective's rows."""
        with np.errstate(all="ignore"):  # steps to where a law is not finite are rejected
            loss_V, slope_VD = self._law.share_gradient(
                self._all_domains(share_A), self.problem.horizon
            )
            active_V = self.problem.active_V
            weight_K = self.problem.weight_V[active_V]
            level_K = weight_K * loss_V[active_V]
            slope_KA = weight_K[:, None] * slope_VD[active_V][:, self._allowed_D]
        if self.problem.minimax:
            return level_K, slope_KA
        return level_K.sum(keepdims=True), slope_KA.sum(axis=0, keepdims=True)

    def prior_start(self) -> Floats:
        """Return the allowed shares close to the prior, else to uniform shares, shape (A,)."""
        prior_D = self.problem.prior_D
        size = int(self._allowed_D.sum())
        reference_A = np.full(size, 1 / size) if prior_D is None else prior_D[self._allowed_D]
        start_A = self._region.center(reference_A)
        with np.errstate(all="ignore"):
            horizon = self.problem.horizon
            loss_V, slope_VD = self._law.share_gradient(self._all_domains(start_A), horizon)
        _check_finite(loss_V, self._all_domains(start_A), self.problem)
        if not np.isfinite(slope_VD[self.problem.active_V][:, self._allowed_D]).all():
            raise LawError.at(
                "law.share_gradient",
                "not finite",
                "the law has no finite slope at shares above 0",
                fix="Fit another law",
            )
        return start_A

    def descend(self, start_A: Floats, *, convex: bool) -> Descent:
        """Return the result of the descent from `start_A`."""
        prior_D = self.problem.prior_D
        uses_prior = self.problem.kl > 0 and prior_D is not None
        descender = Descender(
            self.rows,
            self._region,
            kl=self.problem.kl,
            log_prior_A=np.log(prior_D[self._allowed_D]) if uses_prior else None,
            tolerance=_TOLERANCE_MINIMAX if self.problem.minimax else _TOLERANCE,
            max_steps=2000 if convex else _STEPS_PER_START,
        )
        return descender.run(start_A, convex=convex)

    def starts(self, n_starts: int) -> list[Floats]:
        """Return up to `n_starts` starting points: uniform shares, then the best of two kinds.

        One kind is dominated by a single domain each, the other is drawn from a sparse and a
        uniform Dirichlet distribution; both are ranked by the predicted objective.
        """
        size = self._region.low_A.size
        uniform_A = np.full(size, 1 / size)
        draws = np.random.default_rng(0)  # fixed: equal laws and objectives have equal optima
        sparse_RA = draws.dirichlet(np.full(size, max(0.3, 2 / size)), _CANDIDATE_DRAWS // 2)
        dense_RA = draws.dirichlet(np.ones(size), _CANDIDATE_DRAWS // 2)
        corners_RA = 0.2 * uniform_A + 0.8 * np.eye(size)[:_MAX_CORNERS]
        ranked = [self._ranked(corners_RA), self._ranked(np.vstack([sparse_RA, dense_RA]))]
        chosen = [self._region.center(uniform_A)] if self.problem.prior_D is not None else []
        # Alternating: one kind alone could fill all starts with one basin.
        for pair in zip(*ranked, strict=False):
            chosen.extend(pair)
        chosen.extend(max(ranked, key=len)[min(map(len, ranked)) :])
        return chosen[:n_starts]

    def _ranked(self, start_RA: Floats) -> list[Floats]:
        """Return the allowed shares close to each row, best first; only with finite losses."""
        share_RA = np.stack([self._region.center(start_A) for start_A in start_RA])
        share_RD = np.zeros((len(share_RA), self._allowed_D.size))
        share_RD[:, self._allowed_D] = share_RA
        horizon = self.problem.horizon
        step_R = None if horizon is None else np.full(len(share_RD), horizon)
        with np.errstate(all="ignore"):
            loss_RV = self._law.predict(share_RD, step_R)
        value_R = np.array(
            [self.problem.value(*pair) for pair in zip(loss_RV, share_RD, strict=True)]
        )
        order = np.argsort(value_R, kind="stable")
        return [share_RA[at] for at in order if np.isfinite(value_R[at])]

    def snap_to_floors(self, descent: Descent) -> tuple[Floats, float]:
        """Return shares, shape (D,), and value, with traces set to the floor if that is free."""
        low_A = self._region.low_A
        trace_A = (descent.share_A - low_A < _TRACE_SHARE) & (descent.share_A > low_A)
        log_A = np.where(trace_A, -1e4, np.log(np.maximum(descent.share_A, 1e-300)))
        full_D = self._all_domains(self._region.project(log_A))
        with np.errstate(all="ignore"):
            loss_V, _ = self._law.share_gradient(full_D, self.problem.horizon)
        value = self.problem.value(loss_V, full_D)
        if value <= descent.value + 1e-10 * abs(descent.value):
            return full_D, value
        return self._all_domains(descent.share_A), descent.value

    def _all_domains(self, share_A: Floats) -> Floats:
        share_D = np.zeros(self._allowed_D.size)
        share_D[self._allowed_D] = share_A
        return share_D
