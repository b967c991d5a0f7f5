"""What all laws share: fitting with judgment, steps and their unit, state, and the null models.

A law has two halves. Its *solver* learns from a table, and predicts rows from subsets of it; this
module asks it the questions of judge.py. Shapes: R rows, D domains, V targets, F subsets.
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
from raymix.laws.cross_validation import early, folds, left_out, scores, verdict
from raymix.laws.models.curves import BiMixCurve
from raymix.laws.models.least_squares import Inputs, fit_curves
from raymix.laws.table import Floats, MixtureTable

if TYPE_CHECKING:
    from raymix.laws.search.objective import Objective, Optimum
    from raymix.laws.search.separable import Powers

Answers = tuple[dict[str, Score], dict[str, Score]]
"""Scores by target: of runs left out, and of later steps from earlier ones."""

LEAST_RUNS = 3
"""Runs without which nothing can be left out."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingTable:
    """A table as solvers want it."""

    table: MixtureTable
    inputs: Inputs
    log_loss_VR: Floats
    """NaN where not measured, shape (V, R)."""
    unit: float
    """Geometric mean of the steps, which `inputs.log_step_N` are logs relative to."""

    @property
    def seen_VR(self) -> Floats:
        """Return 1 where a loss was measured, shape (V, R)."""
        return np.isfinite(self.log_loss_VR).astype(np.float64)

    def seen_in(self, use_FR: np.ndarray) -> np.ndarray:
        """Return the rows each target is learned from in each subset, shape (F, V, R).

        A target that a subset holds no loss of keeps all its rows: solvers always have some, and
        `questions` drops what is then no prediction.
        """
        seen_VR = self.seen_VR > 0
        use_FVR = use_FR[:, None, :] & seen_VR
        return np.where(use_FVR.any(axis=2, keepdims=True), use_FVR, seen_VR)


class Solver(Protocol):
    """The half of a law that learns."""

    @property
    def convex(self) -> bool:
        """Return whether the losses are convex in the shares, as learned."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Return what the verdict should add."""
        ...

    def learn(self, data: TrainingTable) -> None:
        """Learn from all rows."""
        ...

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), each time learned from some of them."""
        ...

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        ...

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        ...

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and derivatives (V, D) at one row."""
        ...

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return values and intervals by target and name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned in JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was learned before."""
        ...


@runtime_checkable
class SolvesPowers(Protocol):
    """A solver whose losses may be powers of single shares, which have an exact optimum."""

    def powers(self, inputs: Inputs) -> Powers | None:
        """Return them at one row, or None if they are not."""
        ...


def make_training_table(table: MixtureTable, *, least_runs: int = LEAST_RUNS) -> TrainingTable:
    """Return the table for solvers.

    Raises:
        LawError: If it holds too few runs or mixtures.
    """
    if table.run_count < least_runs:
        need = f"Needed are {least_runs} at least, and about two for each domain"
        raise LawError.at("table.runs", table.run_count, "too few runs for a law", fix=need)
    if np.ptp(table.share_RD, axis=0).max() < 1e-9:
        raise LawError.at(
            "table.share.*",
            "constant",
            "all runs have the same shares: there is nothing to learn from",
            fix="Vary the mixture",
        )
    log_loss_VR = np.log(table.loss_RV).T
    for target, log_loss_R in zip(table.targets, log_loss_VR, strict=True):
        known = {table.runs[row] for row in np.flatnonzero(np.isfinite(log_loss_R))}
        if len(known) < least_runs:
            raise LawError.at(
                f"table.loss.{target}",
                None,
                f"measured in {len(known)} runs, fewer than {least_runs}",
                fix="Measure it in more runs, or choose other targets",
            )
    unit = 1.0 if table.step_R is None else float(np.exp(np.log(table.step_R).mean()))
    return TrainingTable(table, _inputs(table.share_RD, table.step_R, unit), log_loss_VR, unit)


def _inputs(share_RD: Floats, step_R: Floats | None, unit: float) -> Inputs:
    zeros_R = np.zeros(len(share_RD))
    return Inputs(share_RD, zeros_R if step_R is None else np.log(step_R / unit))


def own_domains(table: MixtureTable) -> tuple[np.ndarray, np.ndarray]:
    """Return each target's own domain, shape (V,), and whether their names are the same.

    Where no domain has the target's name, it is the one whose share goes with a low loss most, by
    rank correlation over the last rows of the runs.
    """
    plain = [_plain(name) for name in table.domains]
    last = table.last_rows()
    rank_RD = rankdata(last.share_RD, axis=0)
    own_V, named_V = np.zeros(len(table.targets), int), np.zeros(len(table.targets), bool)
    for at, target in enumerate(table.targets):
        named_V[at] = _plain(target) in plain
        if named_V[at]:
            own_V[at] = plain.index(_plain(target))
            continue
        known_R = np.isfinite(last.loss_RV[:, at])
        rank_R = rankdata(last.loss_RV[known_R, at])
        ranks_RD = rank_RD[known_R] - rank_RD[known_R].mean(axis=0)
        size_D = np.maximum(np.sqrt(np.square(ranks_RD).sum(axis=0)), 1e-12)
        own_V[at] = int(np.argmin((rank_R - rank_R.mean()) @ ranks_RD / size_D))
    return own_V, named_V


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


class FittedLaw:
    """A law around a solver."""

    def __init__(self, kind: str, solver: Solver, *, least_runs: int = LEAST_RUNS) -> None:
        """Name the law; `least_runs` is what its solver needs."""
        self.kind = kind
        self.solver = solver
        self.domains: tuple[str, ...] = ()
        self.targets: tuple[str, ...] = ()
        self.least_runs = least_runs
        self._unit = 1.0
        self._last: float | None = None
        self._most_D = np.zeros(0)

    @property
    def convex(self) -> bool:
        """Return whether every predicted loss is a convex function of the shares."""
        return self.solver.convex

    @property
    def most_D(self) -> Floats:
        """Return the largest share each domain had in any run, shape (D,)."""
        return self._most_D

    def fit(self, table: MixtureTable) -> FitReport:
        """Learn from a table, and return how well rows left out are predicted.

        Raises:
            LawError: If the law cannot be fitted to this table; it is then as it was before.
        """
        began = time.process_time()
        with one_thread():
            data = make_training_table(table, least_runs=self.least_runs)
            self.solver.learn(data)
            self.settle(data)
            return self.judged(data, began, questions(self.solver, data))

    def settle(self, data: TrainingTable) -> None:
        """Take names, steps and range from the table its solver has learned from."""
        self.domains, self.targets = data.table.domains, data.table.targets
        self._unit = data.unit
        self._last = None if data.table.step_R is None else float(data.table.step_R.max())
        self._most_D = data.table.share_RD.max(axis=0)

    def judged(
        self,
        data: TrainingTable,
        began: float,
        answers: Answers,
        candidates: Mapping[str, Score] | None = None,
        notes: Sequence[str] = (),
    ) -> FitReport:
        """Return the report of a solver that has learned.

        Args:
            data: What it learned from.
            began: Processor time when the fit began, in seconds.
            answers: What `questions` returned.
            candidates: Scores of the laws it was chosen among.
            notes: What the verdict should add.
        """
        found, ahead = answers
        nulls = null_scores(data)
        said = verdict(data.table, found, ahead, nulls, [*self.solver.notes, *notes])
        return FitReport(
            law=self.kind,
            rows=len(data.table),
            runs=data.table.run_count,
            cpu_s=time.process_time() - began,
            verdict=said,
            targets=found,
            ahead=ahead,
            nulls=nulls,
            candidates=candidates or {},
            coefficients=self.solver.coefficients(data),
        )

    def _at(self, share_RD: Floats, step_R: Floats | None) -> Inputs:
        share_RD = np.atleast_2d(np.asarray(share_RD, np.float64))
        if not self.domains:
            raise LawError.at("law", self.kind, "not fitted yet", fix="Call fit first")
        if share_RD.shape[1] != len(self.domains):
            raise LawError.at(
                "share_RD.shape",
                share_RD.shape,
                f"not {len(self.domains)} shares, one for each domain",
            )
        if self._last is None:
            if step_R is not None:
                raise LawError.at(
                    "steps", np.ravel(step_R)[0], "the table had no steps, so the law knows none"
                )
            return _inputs(share_RD, None, 1.0)
        step_R = np.full(len(share_RD), self._last) if step_R is None else np.asarray(step_R)
        return _inputs(share_RD, np.broadcast_to(step_R, len(share_RD)), self._unit)

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return losses, shape (R, V), of shares (R, D) after steps (R,), in the table's unit."""
        return self.solver.losses(self._at(share_RD, step_R))

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        """Return standard deviations of the predictions, in nats, shape (R, V)."""
        return self.solver.deviations(self._at(share_RD, step_R))

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        """Return losses, shape (V,), and their derivatives by the shares, shape (V, D)."""
        step_R = None if step is None else np.array([step])
        return self.solver.share_gradient(self._at(share_D[None], step_R))

    def powers(self, step: float | None = None) -> Powers | None:
        """Return what the losses are at a step, if each is a power of one share."""
        if not isinstance(self.solver, SolvesPowers):
            return None
        even_RD = np.full((1, len(self.domains)), 1 / len(self.domains))
        return self.solver.powers(self._at(even_RD, None if step is None else np.array([step])))

    def minimize(self, objective: Objective) -> Optimum:
        """Return the best shares, and what proves or supports that there are none better."""
        from raymix.laws.search.minimize import minimize

        return minimize(self, objective)

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted law in JSON types."""
        return {
            "domains": list(self.domains),
            "targets": list(self.targets),
            "unit": self._unit,
            "last": self._last,
            "most": self._most_D.tolist(),
            "solver": self.solver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become a law that was fitted before."""
        with one_thread():
            self.solver.load_state_dict(state["solver"])
        self.domains, self.targets = tuple(state["domains"]), tuple(state["targets"])
        self._unit, self._last = float(state["unit"]), state["last"]
        self._most_D = np.array(state["most"], np.float64)


def questions(solver: Solver, data: TrainingTable) -> Answers:
    """Return scores by cross-validation over runs, and of later steps from earlier ones."""
    table, use_FR = data.table, folds(data.table)
    early_R = early(table)
    ask_FR = use_FR if early_R is None else np.concatenate([use_FR, early_R[None]])
    unseen_FV = ~(ask_FR[:, None, :] & (data.seen_VR > 0)).any(axis=2)
    predicted_FRV = solver.held_out(data, ask_FR)
    predicted_FRV = np.where(np.expand_dims(unseen_FV, 1), np.nan, predicted_FRV)
    return _answers(table, use_FR, early_R, predicted_FRV)


def _answers(
    table: MixtureTable, use_FR: np.ndarray, early_R: np.ndarray | None, predicted_FRV: Floats
) -> Answers:
    found = scores(table, left_out(use_FR, predicted_FRV[: len(use_FR)]))
    if early_R is None:
        return found, {}
    late_RV = np.where(early_R[:, None], np.nan, predicted_FRV[-1])
    # A target that has no early losses, or no late ones, was not asked about.
    late = scores(table, late_RV)
    return found, {target: score for target, score in late.items() if np.isfinite(score.mre)}


def null_scores(data: TrainingTable) -> dict[str, Score]:
    """Return mean scores of the null models: `mean`, `own`, and with steps `steps`."""
    table, use_FR = data.table, folds(data.table)
    used_FVR = data.seen_in(use_FR)
    used_FRV = np.swapaxes(used_FVR, 1, 2)
    total_FV = np.where(used_FRV, table.loss_RV, 0.0).sum(axis=1)
    mean_FV = total_FV / np.maximum(used_FRV.sum(axis=1), 1)
    guess_FRV = np.broadcast_to(mean_FV[:, None, :], used_FRV.shape)
    found = {"mean": mean_score(scores(table, left_out(use_FR, guess_FRV)))}
    steps = table.has_steps
    own = BiMixCurve(own_domains(table)[0], absent(table.share_RD), steps)
    models = {"own": (own, data.inputs)}
    if steps:
        blind = Inputs(np.ones((len(table), 1)), data.inputs.log_step_N)
        models["steps"] = (BiMixCurve(np.zeros(len(table.targets), int), 0.0, steps), blind)
    for name, (curve, inputs) in models.items():
        use_BR = used_FVR.reshape(-1, len(table)).astype(np.float64)
        y_BR = np.tile(data.log_loss_VR, (len(use_FR), 1))
        fitted = fit_curves(curve, inputs, y_BR, use_BR, rounds=1)
        loss_BR = np.exp(curve.evaluate(fitted.theta_BP, inputs)[0])
        loss_FRV = np.swapaxes(loss_BR.reshape(len(use_FR), -1, len(table)), 1, 2)
        found[name] = mean_score(scores(table, left_out(use_FR, loss_FRV)))
    return found


def absent(share_RD: Floats) -> float:
    """Return what to add to shares that may be 0: half the least that is not, else nothing."""
    return float(share_RD[share_RD > 0].min() / 2) if (share_RD <= 0).any() else 0.0
