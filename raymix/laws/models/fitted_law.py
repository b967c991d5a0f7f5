"""The common half of all laws: cross-validation, unit of steps, state, null models.

A law has two halves. Its *solver* is fitted to a table and to subsets of it; `FittedLaw` wraps a
solver and scores it with `raymix.laws.cross_validation`.

Shapes: R rows of the table, N new rows, D domains, V targets, F subsets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from scipy.stats import rankdata

from raymix._utils.threads import one_thread
from raymix.errors import LawError
from raymix.laws.base import FitReport, Score, mean_score
from raymix.laws.cross_validation import early_rows, folds, out_of_fold, scores, verdict
from raymix.laws.models.curves import BiMixCurve
from raymix.laws.models.least_squares import Inputs, fit_curves
from raymix.laws.table import Floats, MixtureTable

if TYPE_CHECKING:
    from raymix.laws.search.objective import Objective, Optimum
    from raymix.laws.search.separable import Powers

HeldOutScores = tuple[dict[str, Score], dict[str, Score]]
"""Scores by target: of held-out runs, and of later steps predicted from earlier ones."""

MIN_RUNS = 3
"""Fewest runs for cross-validation: two to fit, one to predict."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingTable:
    """A mixture table in the form that solvers are fitted to."""

    table: MixtureTable
    inputs: Inputs
    log_loss_VR: Floats
    """NaN where not measured, shape (V, R)."""
    unit: float
    """Geometric mean of the steps; `inputs.log_step_N` are logs of steps over it."""

    @property
    def seen_VR(self) -> Floats:
        """Return 1 where a loss was measured, shape (V, R)."""
        return np.isfinite(self.log_loss_VR).astype(np.float64)

    def seen_in(self, use_FR: np.ndarray) -> np.ndarray:
        """Return a mask of the training rows per subset and target, shape (F, V, R).

        A target without a loss in a subset gets all its rows, so that solvers never fit to no rows;
        `cross_validate` discards these predictions.
        """
        seen_VR = self.seen_VR > 0
        use_FVR = use_FR[:, None, :] & seen_VR
        return np.where(use_FVR.any(axis=2, keepdims=True), use_FVR, seen_VR)


class Solver(Protocol):
    """The fitted half of a law."""

    @property
    def convex(self) -> bool:
        """Return whether the fitted losses are convex in the shares."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Return sentences to append to the verdict."""
        ...

    def learn(self, data: TrainingTable) -> None:
        """Fit to all rows."""
        ...

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), fitted to each subset of the rows."""
        ...

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        ...

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        ...

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and derivatives by the shares (V, D) at one row."""
        ...

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return values and intervals, by target and coefficient."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted state in JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        ...


@runtime_checkable
class PowersSolver(Protocol):
    """A solver whose losses may be powers of single shares, which have an exact optimum."""

    def powers(self, inputs: Inputs) -> Powers | None:
        """Return the powers at one row; None if the losses have another form."""
        ...


def make_training_table(table: MixtureTable, *, min_runs: int = MIN_RUNS) -> TrainingTable:
    """Return the table in the form for solvers.

    Raises:
        LawError: If the table has too few runs or a single mixture.
    """
    if table.run_count < min_runs:
        allowed = f"At least {min_runs} are needed, and about two for each domain"
        raise LawError.at("table.runs", table.run_count, "too few runs for a law", fix=allowed)
    if np.ptp(table.share_RD, axis=0).max() < 1e-9:
        raise LawError.at(
            "table.share.*",
            "constant",
            "all runs have the same shares, so no effect of shares can be fitted",
            fix="Vary the mixture",
        )
    log_loss_VR = np.log(table.loss_RV).T
    for target, log_loss_R in zip(table.targets, log_loss_VR, strict=True):
        measured_runs = {table.runs[row] for row in np.flatnonzero(np.isfinite(log_loss_R))}
        if len(measured_runs) < min_runs:
            raise LawError.at(
                f"table.loss.{target}",
                None,
                f"measured in {len(measured_runs)} runs, fewer than {min_runs}",
                fix="Measure it in more runs, or choose other targets",
            )
    # Logs of steps over their geometric mean have mean 0: scale and exponent of a power of steps
    # are then nearly uncorrelated, whatever the unit of the table.
    unit = 1.0 if table.step_R is None else float(np.exp(np.log(table.step_R).mean()))
    return TrainingTable(table, _make_inputs(table.share_RD, table.step_R, unit), log_loss_VR, unit)


def _make_inputs(share_RD: Floats, step_R: Floats | None, unit: float) -> Inputs:
    zeros_R = np.zeros(len(share_RD))
    return Inputs(share_RD, zeros_R if step_R is None else np.log(step_R / unit))


def own_domains(table: MixtureTable) -> tuple[np.ndarray, np.ndarray]:
    """Return each target's own domain, shape (V,), and a mask of those matched by name, (V,).

    A target without a domain of its name gets the domain whose share has the most negative rank
    correlation with the loss, over the last rows of the runs.
    """
    normalized = [_normalized_name(name) for name in table.domains]
    last_rows = table.last_rows()
    rank_RD = rankdata(last_rows.share_RD, axis=0)
    own_V, named_V = np.zeros(len(table.targets), int), np.zeros(len(table.targets), bool)
    for at, target in enumerate(table.targets):
        named_V[at] = _normalized_name(target) in normalized
        if named_V[at]:
            own_V[at] = normalized.index(_normalized_name(target))
            continue
        known_R = np.isfinite(last_rows.loss_RV[:, at])
        rank_R = rankdata(last_rows.loss_RV[known_R, at])
        ranks_RD = rank_RD[known_R] - rank_RD[known_R].mean(axis=0)
        # A constant share has no ranks to correlate: its correlation is 0, not NaN.
        norm_D = np.maximum(np.sqrt(np.square(ranks_RD).sum(axis=0)), 1e-12)
        own_V[at] = int(np.argmin((rank_R - rank_R.mean()) @ ranks_RD / norm_D))
    return own_V, named_V


def _normalized_name(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


class FittedLaw:
    """A law made of a solver: cross-validation, input checks, optimum and state."""

    def __init__(self, kind: str, solver: Solver, *, min_runs: int = MIN_RUNS) -> None:
        """Wrap an unfitted solver that needs at least `min_runs` runs."""
        self.kind = kind
        self.solver = solver
        self.domains: tuple[str, ...] = ()
        self.targets: tuple[str, ...] = ()
        self.min_runs = min_runs
        self._unit = 1.0
        self._last_step: float | None = None
        self._max_share_D = np.zeros(0)

    @property
    def convex(self) -> bool:
        """Return whether every predicted loss is a convex function of the shares."""
        return self.solver.convex

    @property
    def max_share_D(self) -> Floats:
        """Return the largest share of each domain over the runs, shape (D,)."""
        return self._max_share_D

    def fit(self, table: MixtureTable) -> FitReport:
        """Fit the law to a table and return its held-out scores.

        Raises:
            LawError: If the law cannot be fitted to this table; the law is then unchanged.
        """
        # CPU time, not wall time: reports of equal fits on a busy machine stay comparable.
        start_cpu_s = time.process_time()
        with one_thread():
            data = make_training_table(table, min_runs=self.min_runs)
            self.solver.learn(data)
            # After `learn`, which may raise: new names must not go with old coefficients.
            self.record_table(data)
            return self.make_report(data, start_cpu_s, cross_validate(self.solver, data))

    def record_table(self, data: TrainingTable) -> None:
        """Store names, unit and last step, and share range of the solver's training table."""
        self.domains, self.targets = data.table.domains, data.table.targets
        self._unit = data.unit
        self._last_step = None if data.table.step_R is None else float(data.table.step_R.max())
        self._max_share_D = data.table.share_RD.max(axis=0)

    def make_report(
        self,
        data: TrainingTable,
        start_cpu_s: float,
        held_out_scores: HeldOutScores,
        candidates: Mapping[str, Score] | None = None,
        notes: Sequence[str] = (),
    ) -> FitReport:
        """Return the report of a fitted solver.

        Args:
            data: The training table.
            start_cpu_s: CPU time of the process at the start of the fit, in seconds.
            held_out_scores: The scores of `cross_validate`.
            candidates: Mean scores of the kinds that `auto` compared.
            notes: Sentences to append to the verdict.
        """
        by_run, ahead = held_out_scores
        nulls = null_scores(data)
        verdict_text = verdict(data.table, by_run, ahead, nulls, [*self.solver.notes, *notes])
        return FitReport(
            law=self.kind,
            rows=len(data.table),
            runs=data.table.run_count,
            cpu_s=time.process_time() - start_cpu_s,
            verdict=verdict_text,
            targets=by_run,
            ahead=ahead,
            nulls=nulls,
            candidates=candidates or {},
            coefficients=self.solver.coefficients(data),
        )

    def _inputs_at(self, share_RD: Floats, step_R: Floats | None) -> Inputs:
        share_RD = np.atleast_2d(np.asarray(share_RD, np.float64))
        if not self.domains:
            raise LawError.at("law", self.kind, "not fitted yet", fix="Call fit first")
        if share_RD.shape[1] != len(self.domains):
            raise LawError.at(
                "share_RD.shape",
                share_RD.shape,
                f"not {len(self.domains)} shares, one for each domain",
            )
        if self._last_step is None:
            if step_R is not None:
                raise LawError.at(
                    "steps", np.ravel(step_R)[0], "the table had no steps, so the law has none"
                )
            return _make_inputs(share_RD, None, 1.0)
        step_R = np.full(len(share_RD), self._last_step) if step_R is None else np.asarray(step_R)
        return _make_inputs(share_RD, np.broadcast_to(step_R, len(share_RD)), self._unit)

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return losses in nats, shape (R, V), of shares (R, D) after steps (R,)."""
        return self.solver.losses(self._inputs_at(share_RD, step_R))

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return standard deviations of the predictions, in nats, shape (R, V)."""
        return self.solver.deviations(self._inputs_at(share_RD, step_R))

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        """Return losses, shape (V,), and their derivatives by the shares, shape (V, D)."""
        step_R = None if step is None else np.array([step])
        return self.solver.share_gradient(self._inputs_at(share_D[None], step_R))

    def powers(self, step: float | None = None) -> Powers | None:
        """Return the losses at a step as powers of one share each; None if they are not."""
        if not isinstance(self.solver, PowersSolver):
            return None
        # Any shares above 0 do: scales and exponents do not depend on them.
        even_RD = np.full((1, len(self.domains)), 1 / len(self.domains))
        return self.solver.powers(
            self._inputs_at(even_RD, None if step is None else np.array([step]))
        )

    def minimize(self, objective: Objective) -> Optimum:
        """Return the optimal shares, with a bound on the gap where the law is convex."""
        # Here, because `search.minimize` imports `Law`, and `models` would import it in a circle.
        from raymix.laws.search.minimize import minimize

        return minimize(self, objective)

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted law in JSON types."""
        return {
            "domains": list(self.domains),
            "targets": list(self.targets),
            "unit": self._unit,
            "last": self._last_step,
            "most": self._max_share_D.tolist(),
            "solver": self.solver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        # The Gaussian process inverts its matrices again.
        with one_thread():
            self.solver.load_state_dict(state["solver"])
        self.domains, self.targets = tuple(state["domains"]), tuple(state["targets"])
        self._unit, self._last_step = float(state["unit"]), state["last"]
        self._max_share_D = np.array(state["most"], np.float64)


def cross_validate(solver: Solver, data: TrainingTable) -> HeldOutScores:
    """Return scores by cross-validation over runs, and of later steps from earlier ones."""
    table, use_FR = data.table, folds(data.table)
    early_R = early_rows(table)
    # The early rows are one more subset, so that solvers fit all subsets in one batch.
    subset_FR = use_FR if early_R is None else np.concatenate([use_FR, early_R[None]])
    untrained_FV = ~(subset_FR[:, None, :] & (data.seen_VR > 0)).any(axis=2)
    predicted_FRV = solver.held_out(data, subset_FR)
    # These were fitted to all rows (see `seen_in`), the held-out ones included: no prediction.
    predicted_FRV = np.where(np.expand_dims(untrained_FV, 1), np.nan, predicted_FRV)
    return _held_out_scores(table, use_FR, early_R, predicted_FRV)


def _held_out_scores(
    table: MixtureTable, use_FR: np.ndarray, early_R: np.ndarray | None, predicted_FRV: Floats
) -> HeldOutScores:
    by_run = scores(table, out_of_fold(use_FR, predicted_FRV[: len(use_FR)]))
    if early_R is None:
        return by_run, {}
    late_RV = np.where(early_R[:, None], np.nan, predicted_FRV[-1])
    # A target without early or without late losses has no score; it must not drag the mean to NaN.
    late_scores = scores(table, late_RV)
    ahead = {target: score for target, score in late_scores.items() if np.isfinite(score.mre)}
    return by_run, ahead


def null_scores(data: TrainingTable) -> dict[str, Score]:
    """Return mean scores of the null models: `mean`, `own`, and with steps `steps`."""
    table, use_FR = data.table, folds(data.table)
    used_FVR = data.seen_in(use_FR)
    used_FRV = np.swapaxes(used_FVR, 1, 2)
    # where, not a product with the mask: 0 x NaN is NaN.
    total_FV = np.where(used_FRV, table.loss_RV, 0.0).sum(axis=1)
    mean_FV = total_FV / np.maximum(used_FRV.sum(axis=1), 1)
    mean_FRV = np.broadcast_to(mean_FV[:, None, :], used_FRV.shape)
    mean_scores = {"mean": mean_score(scores(table, out_of_fold(use_FR, mean_FRV)))}
    steps = table.has_steps
    own = BiMixCurve(own_domains(table)[0], share_offset(table.share_RD), steps)
    models = {"own": (own, data.inputs)}
    if steps:
        # A share of 1 in all rows turns BiMix into a power of steps alone.
        steps_only = Inputs(np.ones((len(table), 1)), data.inputs.log_step_N)
        models["steps"] = (BiMixCurve(np.zeros(len(table.targets), int), 0.0, steps), steps_only)
    for name, (curve, inputs) in models.items():
        use_BR = used_FVR.reshape(-1, len(table)).astype(np.float64)
        y_BR = np.tile(data.log_loss_VR, (len(use_FR), 1))
        fitted = fit_curves(curve, inputs, y_BR, use_BR, rounds=1)
        loss_BR = np.exp(curve.evaluate(fitted.theta_BP, inputs)[0])
        loss_FRV = np.swapaxes(loss_BR.reshape(len(use_FR), -1, len(table)), 1, 2)
        mean_scores[name] = mean_score(scores(table, out_of_fold(use_FR, loss_FRV)))
    return mean_scores


def share_offset(share_RD: Floats) -> float:
    """Return the offset of shares in powers: half the smallest positive share, 0 without zeros."""
    return float(share_RD[share_RD > 0].min() / 2) if (share_RD <= 0).any() else 0.0
