"""`law: auto`: the law that predicts runs left out best, and says which it was.

Candidates are compared on the training table alone: mean relative error over targets, of runs left
out and, with steps, of later steps from earlier ones, each counting as much. Shapes: V targets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raymix._utils.threads import one_thread
from raymix.errors import LawError, format_problem
from raymix.laws.base import FitReport, Score, build_law, law, mean_score
from raymix.laws.models.fitted_law import Answers, FittedLaw, make_training_table, questions
from raymix.laws.table import Floats, MixtureTable

if TYPE_CHECKING:
    from raymix.laws.search.objective import Objective, Optimum

CANDIDATES = ("bimix", "exponential", "additive", "regression", "gp")
WITH_STEPS = ("joint",)


class AutoLaw:
    """Fits the candidates, becomes the best."""

    def __init__(self, candidates: Sequence[str] | None = None) -> None:
        """Choose among kinds of laws; left out: all that need no extra."""
        self._kinds = candidates
        self._chosen: FittedLaw | None = None

    @property
    def chosen(self) -> FittedLaw:
        """Return the law it became."""
        if self._chosen is None:
            raise LawError.at("law", "auto", "not fitted yet", fix="Call fit first")
        return self._chosen

    @property
    def kind(self) -> str:
        """Return the name of the law it became."""
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
    def most_D(self) -> Floats:
        """Return the largest share each domain had in any run, shape (D,)."""
        return self.chosen.most_D

    def fit(self, table: MixtureTable) -> FitReport:
        """Fit every candidate; report on the best one.

        Raises:
            LawError: If none can be fitted.
        """
        with one_thread():
            return self._fit(table)

    def _fit(self, table: MixtureTable) -> FitReport:
        began = time.process_time()
        data = make_training_table(table)
        fitted: dict[str, FittedLaw] = {}
        answers: dict[str, Answers] = {}
        found: dict[str, tuple[Score, float]] = {}
        problems: list[str] = []
        kinds = self._kinds or (*CANDIDATES, *(WITH_STEPS if table.has_steps else ()))
        for kind in kinds:
            candidate = build_law(kind)
            if not isinstance(candidate, FittedLaw):
                continue
            try:
                # Some kinds need more runs than others.
                enough = make_training_table(table, least_runs=candidate.least_runs)
                candidate.solver.learn(enough)
                answers[kind] = apart, ahead = questions(candidate.solver, enough)
            except LawError as error:
                problems.append(f"{kind}: {error}")
                continue
            errors = [mean_score(apart).mre, *([mean_score(ahead).mre] if ahead else [])]
            fitted[kind], found[kind] = candidate, (mean_score(apart), float(np.mean(errors)))
        sound = {kind: error for kind, (_, error) in found.items() if np.isfinite(error)}
        if not sound:
            raise LawError(
                format_problem("law", "auto", "no law can be fitted to this table"), *problems
            )
        best = min(sound, key=lambda kind: sound[kind])
        self._chosen = fitted[best]
        self._chosen.settle(data)
        tried = {kind: mean for kind, (mean, _) in found.items()}
        note = f"Chosen by cross-validation: {best}, of {', '.join(tried)}"
        return self._chosen.judged(data, began, answers[best], tried, [note])

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return losses, shape (R, V), of shares (R, D) after steps (R,), in the table's unit."""
        return self.chosen.predict(share_RD, step_R)

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return standard deviations of the predictions, in nats, shape (R, V)."""
        return self.chosen.deviation(share_RD, step_R)

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        """Return losses, shape (V,), and their derivatives by the shares, shape (V, D)."""
        return self.chosen.share_gradient(share_D, step)

    def minimize(self, objective: Objective) -> Optimum:
        """Return the best shares, and what proves or supports that there are none better."""
        return self.chosen.minimize(objective)

    def state_dict(self) -> dict[str, Any]:
        """Return the law it became in JSON types; `law_from_dict` builds that law."""
        return self.chosen.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse: a saved law has the kind it became.

        Raises:
            LawError: Always.
        """
        raise LawError.at("law", "auto", "no kind of a fitted law", fix="Name the kind")


@law("auto")
def _auto(*, candidates: Sequence[str] | None = None) -> AutoLaw:
    return AutoLaw(candidates)
