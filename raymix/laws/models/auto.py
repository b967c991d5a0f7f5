"""`law: auto`: model selection by cross-validation.

Candidates are compared by the mean relative error over targets on held-out runs and, with steps, on
later steps predicted from earlier ones; both count the same. Only the training table is used.

Shapes: R rows, D domains, V targets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix._utils.threads import one_thread
from raymix.errors import LawError, format_problem
from raymix.laws.base import FitReport, Score, build_law, law, mean_score
from raymix.laws.models.fitted_law import (
    FittedLaw,
    HeldOutScores,
    cross_validate,
    make_training_table,
)
from raymix.laws.table import Floats, MixtureTable

if TYPE_CHECKING:
    from raymix.laws.search.objective import Objective, Optimum

CANDIDATES = ("bimix", "exponential", "additive", "regression", "gp")
STEP_CANDIDATES = ("joint",)  # without steps it is the additive law


class AutoLaw:
    """Fits the candidates and delegates to the best one."""

    def __init__(self, candidates: Sequence[str] | None = None) -> None:
        """Set the kinds to compare; default: all that need no optional dependency."""
        self._kinds = candidates
        self._chosen: FittedLaw | None = None

    @property
    def chosen(self) -> FittedLaw:
        """Return the selected law."""
        if self._chosen is None:
            raise LawError.at("law", "auto", "not fitted yet", fix="Call fit first")
        return self._chosen

    @property
    def kind(self) -> str:
        """Return the kind of the selected law, `auto` before the fit."""
        return "auto" if self._chosen is None else self._chosen.kind

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains."""
        return () if self._chosen is None else self._chosen.domains

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the targets."""
        return () if self._chosen is None else self._chosen.targets

    @property
    def convex(self) -> bool:
        """Return whether every predicted loss is a convex function of the shares."""
        return self.chosen.convex

    @property
    def max_share_D(self) -> Floats:
        """Return the largest share of each domain over the runs, shape (D,)."""
        return self.chosen.max_share_D

    def fit(self, table: MixtureTable) -> FitReport:
        """Fit all candidates, select one, and return its report.

        Raises:
            LawError: If no candidate can be fitted.
        """
        with one_thread():
            return self._fit(table)

    def _fit(self, table: MixtureTable) -> FitReport:
        start_cpu_s = time.process_time()
        data = make_training_table(table)
        fitted: dict[str, FittedLaw] = {}
        held_out_scores: dict[str, HeldOutScores] = {}
        error_of: dict[str, tuple[Score, float]] = {}
        problems: list[str] = []
        kinds = self._kinds or (*CANDIDATES, *(STEP_CANDIDATES if table.has_steps else ()))
        for kind in kinds:
            candidate = build_law(kind)
            if not isinstance(candidate, FittedLaw):
                continue
            # The `fit` of a candidate would also bootstrap coefficients and score null models:
            # only the selected law needs them.
            try:
                # Some kinds need more runs than others.
                training = make_training_table(table, min_runs=candidate.min_runs)
                candidate.solver.learn(training)
                held_out_scores[kind] = by_run, ahead = cross_validate(candidate.solver, training)
            except LawError as error:
                problems.append(f"{kind}: {error}")
                continue
            errors = [mean_score(by_run).mre, *([mean_score(ahead).mre] if ahead else [])]
            fitted[kind], error_of[kind] = candidate, (mean_score(by_run), float(np.mean(errors)))
        finite_errors = {kind: error for kind, (_, error) in error_of.items() if np.isfinite(error)}
        if not finite_errors:
            raise LawError(
                format_problem("law", "auto", "no law can be fitted to this table"), *problems
            )
        # Dicts keep their order, so ties go to the first candidate on every machine.
        best = min(finite_errors, key=lambda kind: finite_errors[kind])
        self._chosen = fitted[best]
        self._chosen.record_table(data)
        mean_scores = {kind: score for kind, (score, _) in error_of.items()}
        note = f"Chosen by cross-validation: {best}, of {', '.join(mean_scores)}"
        return self._chosen.make_report(
            data, start_cpu_s, held_out_scores[best], mean_scores, [note]
        )

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return losses in nats, shape (R, V), of shares (R, D) after steps (R,)."""
        return self.chosen.predict(share_RD, step_R)

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return standard deviations of the predictions, in nats, shape (R, V)."""
        return self.chosen.deviation(share_RD, step_R)

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        """Return losses, shape (V,), and their derivatives by the shares, shape (V, D)."""
        return self.chosen.share_gradient(share_D, step)

    def minimize(self, objective: Objective) -> Optimum:
        """Return the optimal shares, with a bound on the gap where the law is convex."""
        return self.chosen.minimize(objective)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the selected law in JSON types; `law_from_dict` builds that law."""
        return self.chosen.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reject all states: a saved law has the kind of the selected law, never `auto`.

        Raises:
            LawError: Always.
        """
        raise LawError.at("law", "auto", "not the kind of a fitted law", fix="Name the kind")


@law("auto")
def _auto(*, candidates: Sequence[str] | None = None) -> AutoLaw:
    return AutoLaw(candidates)
