"""The law `gp`: the additive or joint curve plus a Gaussian process for its residuals.

Shapes: R rows of the table, N new or used rows, D domains, V targets, F subsets, P coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymix.laws.base import law
from raymix.laws.models.fitted_law import FittedLaw, TrainingTable
from raymix.laws.models.gaussian_process import Hyper, Process, ProcessRows, condition, fit_process
from raymix.laws.models.least_squares import CurveFits, Inputs
from raymix.laws.models.parametric import AnyCurve, CurveSolver
from raymix.laws.table import Floats

MAX_REFIT_ROWS = 100
"""Largest table for which folds refit hyper-parameters; beyond, they use those of all rows."""
_DIFFERENCE_STEP = 1e-4  # of the shift of theta; central, so the error is of second order


class _Target:
    """One target: the coefficients of its curve, and its process."""

    def __init__(
        self, curve: AnyCurve, theta_P: Floats, theta_shift_P: Floats, process: Process
    ) -> None:
        self.curve = curve
        self.theta_P = theta_P
        self.theta_shift_P = theta_shift_P
        """Posterior coefficients of the joint model minus `theta_P`."""
        self.process = process

    def log_loss(self, inputs: Inputs) -> Floats:
        """Return log losses of new rows, shape (N,)."""
        at_BN, jac_BNP = self.curve.evaluate(self.theta_P[None], inputs)
        # Linear in theta, as in the model that the process was conditioned in.
        trend_N = at_BN[0] + jac_BNP[0] @ self.theta_shift_P
        return trend_N + self.process.mean(np.sqrt(inputs.share_ND), inputs.log_step_N)

    def deviation(self, inputs: Inputs, sd_P: Floats) -> Floats:
        """Return standard deviations of the log losses, shape (N,)."""
        scaled_jac_NP = self.curve.evaluate(self.theta_P[None], inputs)[1][0] * sd_P
        root_ND = np.sqrt(inputs.share_ND)
        return self.process.deviation(root_ND, inputs.log_step_N, scaled_jac_NP)

    def gradient(self, inputs: Inputs) -> Floats:
        """Return derivatives of the log loss by the shares at one row, shape (D,)."""
        # The trend is jac(share) @ shift, so its slope needs mixed second derivatives of the curve:
        # a difference of share gradients along the shift replaces them.
        theta_BP = (
            self.theta_P
            + np.array([[0.0], [_DIFFERENCE_STEP], [-_DIFFERENCE_STEP]]) * self.theta_shift_P
        )
        loss_BN, by_share_BND = self.curve.share_gradient(theta_BP, inputs)
        log_BD = by_share_BND[:, 0] / loss_BN
        trend_D = log_BD[0] + (log_BD[1] - log_BD[2]) / (2 * _DIFFERENCE_STEP)
        return trend_D + self.process.gradient(inputs.share_ND[0], float(inputs.log_step_N[0]))


class ProcessSolver:
    """Fits the curves of all targets in one batch, then one process per target."""

    convex = False
    notes: Sequence[str] = ()

    def __init__(self) -> None:
        """Create an unfitted solver."""
        self._trend = CurveSolver("joint")
        self._targets: list[_Target] = []

    def learn(self, data: TrainingTable) -> None:
        """Fit to all rows."""
        self._trend.learn(data)
        self._targets = self._fit_processes(data, self._trend.fitted, data.seen_VR > 0)

    def _fit_processes(
        self, data: TrainingTable, fitted: CurveFits, use_VR: np.ndarray
    ) -> list[_Target]:
        """Return one process per target, fitted to its used rows around its fitted curve."""
        targets = []
        for at, (theta_P, row_R) in enumerate(zip(fitted.theta_BP, use_VR, strict=True)):
            rows, residual = _rows(
                self._trend.curve,
                theta_P,
                fitted.mean_BP[at],
                fitted.sd_P,
                data.inputs.rows(row_R),
                data.log_loss_VR[at, row_R],
            )
            process = fit_process(rows, residual)
            theta_shift_P = fitted.mean_BP[at] - theta_P + fitted.sd_P * process.shift_P
            targets.append(_Target(self._trend.curve, theta_P, theta_shift_P, process))
        return targets

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), fitted to each subset of the rows.

        Beyond `MAX_REFIT_ROWS` rows only the held-out ones are predicted, at fixed hyper-parameters
        and from a block of the known inverse; the others are NaN.
        """
        if len(data.table) > MAX_REFIT_ROWS:
            return np.stack([self._leave_fold_out(data, use_R) for use_R in use_FR])
        fitted = self._trend.fit_subsets(data, use_FR)
        count = len(data.table.targets)
        loss_FRV = []
        for at, use_VR in enumerate(data.seen_in(use_FR)):
            fold_fits = fitted.select(slice(at * count, (at + 1) * count))
            targets = self._fit_processes(data, fold_fits, use_VR)
            loss_FRV.append(np.exp([target.log_loss(data.inputs) for target in targets]).T)
        return np.stack(loss_FRV)

    def _leave_fold_out(self, data: TrainingTable, use_R: np.ndarray) -> Floats:
        """Return the losses of unused rows given the used ones, shape (R, V); NaN for used rows."""
        # Partitioned inverse: the held-out residuals are (S^-1)_oo^-1 w_o. A fold costs a solve of
        # its own size instead of an inversion of all other rows.
        loss_RV = np.full((len(use_R), len(self._targets)), np.nan)
        for at, target in enumerate(self._targets):
            seen_R = np.isfinite(data.log_loss_VR[at])
            left_out_N = ~use_R[seen_R]
            process = target.process
            block = process.inverse_NN[np.ix_(left_out_N, left_out_N)]
            error = np.linalg.solve(block, process.weight_N[left_out_N])
            loss_RV[seen_R & ~use_R, at] = np.exp(data.log_loss_VR[at, seen_R][left_out_N] - error)
        return loss_RV

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        return np.exp([target.log_loss(inputs) for target in self._targets]).T

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        sd_P = self._trend.fitted.sd_P
        log_NV = np.stack([target.deviation(inputs, sd_P) for target in self._targets], axis=1)
        return self.losses(inputs) * log_NV

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and derivatives by the shares (V, D) at one row."""
        loss_V = self.losses(inputs)[0]
        return loss_V, loss_V[:, None] * np.stack([t.gradient(inputs) for t in self._targets])

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return values and intervals of the curve's coefficients."""
        return self._trend.coefficients(data)

    def state_dict(self) -> dict[str, Any]:
        """Return curve, hyper-parameters and rows in JSON types."""
        # Targets measured in all rows have equal inputs: stored once, they are most of the file.
        shared = self._targets[0].process.rows
        same_rows = all(_same_rows(target.process.rows, shared) for target in self._targets)
        return {
            "trend": self._trend.state_dict(),
            "targets": [_target_state(t, own_rows=not same_rows) for t in self._targets],
            "root": np.round(shared.root_ND, 12).tolist() if same_rows else None,
            "log_step": shared.log_step_N.tolist() if same_rows else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; the processes are conditioned on their rows again.

        The inverse is not stored: N^2 numbers per target, which the rows determine.
        """
        self._trend.load_state_dict(state["trend"])
        fitted, curve = self._trend.fitted, self._trend.curve
        targets: list[_Target] = []
        for at, target_state in enumerate(state["targets"]):
            root_ND = np.array(target_state.get("root", state["root"]))
            log_step_N = np.array(target_state.get("log_step", state["log_step"]))
            theta_P, log_loss_N = fitted.theta_BP[at], np.array(target_state["log_loss"])
            inputs = Inputs(root_ND**2, log_step_N)
            rows, _ = _rows(curve, theta_P, fitted.mean_BP[at], fitted.sd_P, inputs, log_loss_N)
            rows = ProcessRows(
                root_ND,
                log_step_N,
                rows.level_N,
                rows.residual_N,
                rows.scaled_jac_NP,
                np.array(target_state["doubt"]),
            )
            process = condition(Hyper.of(np.array(target_state["hyper"])), rows)
            theta_shift_P = fitted.mean_BP[at] - theta_P + fitted.sd_P * process.shift_P
            targets.append(_Target(curve, theta_P, theta_shift_P, process))
        self._targets = targets


def _same_rows(first: ProcessRows, second: ProcessRows) -> bool:
    """Return whether shares and steps are equal; they differ where a loss is missing."""
    return np.array_equal(first.root_ND, second.root_ND) and np.array_equal(
        first.log_step_N, second.log_step_N
    )


def _target_state(target: _Target, *, own_rows: bool) -> dict[str, Any]:
    """Return the state of one target; losses are the residuals plus the curve at its prior mean."""
    rows = target.process.rows
    inputs = Inputs(rows.root_ND**2, rows.log_step_N)
    at_BN, jac_BNP = target.curve.evaluate(target.theta_P[None], inputs)
    shift_P = target.process.shift_P

    # theta_shift = mean - theta + sd x shift and scaled_jac = jac x sd, so the difference is
    # jac @ (mean - theta).
    mean_N = at_BN[0] + jac_BNP[0] @ target.theta_shift_P - rows.scaled_jac_NP @ shift_P
    own = {"root": rows.root_ND.tolist(), "log_step": rows.log_step_N.tolist()} if own_rows else {}
    return {
        **own,
        "log_loss": (rows.residual_N + mean_N).tolist(),
        "doubt": rows.robust_weight_N.tolist(),
        "hyper": target.process.hyper.vector.tolist(),
    }


def _rows(
    curve: AnyCurve,
    theta_P: Floats,
    mean_P: Floats,
    sd_P: Floats,
    inputs: Inputs,
    log_loss_N: Floats,
) -> tuple[ProcessRows, float]:
    """Return the training rows of one target's process, and the curve's median residual."""
    at_BN, jac_BNP = curve.evaluate(theta_P[None], inputs)
    at_N, jac_NP = at_BN[0], jac_BNP[0]
    spread = float(at_N.std())
    rows = ProcessRows(
        root_ND=np.sqrt(inputs.share_ND),
        log_step_N=inputs.log_step_N,
        level_N=(at_N - at_N.mean()) / (spread if spread > 0 else 1.0),
        residual_N=log_loss_N - at_N - jac_NP @ (mean_P - theta_P),
        scaled_jac_NP=jac_NP * sd_P,
        robust_weight_N=np.ones(len(at_N)),
    )
    return rows, float(np.median(np.abs(log_loss_N - at_N)))


@law("gp")
def _gp() -> FittedLaw:
    return FittedLaw("gp", ProcessSolver())
