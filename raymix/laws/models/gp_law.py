"""The law `gp`: the additive or joint curve, and a Gaussian process around it.

Shapes: R and N rows, D domains, V targets, F subsets, P coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymix.laws.base import law
from raymix.laws.models.fitted_law import FittedLaw, TrainingTable
from raymix.laws.models.gaussian_process import Hyper, Process, ProcessRows, condition, fit_process
from raymix.laws.models.least_squares import Fitted, Inputs
from raymix.laws.models.parametric import AnyCurve, CurveSolver
from raymix.laws.table import Floats

FEW_ROWS = 100
"""Up to so many rows, folds find hyper-parameters of their own; beyond, they keep the whole's."""
_NUDGE = 1e-4


class _Target:
    """One target: its curve's coefficients, and the process around it."""

    def __init__(self, curve: AnyCurve, theta_P: Floats, move_P: Floats, process: Process) -> None:
        self.curve = curve
        self.theta_P = theta_P
        self.move_P = move_P
        """From there to the coefficients that curve and process agree on."""
        self.process = process

    def log_loss(self, inputs: Inputs) -> Floats:
        """Return log losses of new rows, shape (N,)."""
        at_BN, jac_BNP = self.curve.evaluate(self.theta_P[None], inputs)
        trend_N = at_BN[0] + jac_BNP[0] @ self.move_P
        return trend_N + self.process.mean(np.sqrt(inputs.share_ND), inputs.log_step_N)

    def deviation(self, inputs: Inputs, sd_P: Floats) -> Floats:
        """Return standard deviations of the log losses, shape (N,)."""
        spread_NP = self.curve.evaluate(self.theta_P[None], inputs)[1][0] * sd_P
        root_ND = np.sqrt(inputs.share_ND)
        return self.process.deviation(root_ND, inputs.log_step_N, spread_NP)

    def gradient(self, inputs: Inputs) -> Floats:
        """Return derivatives of the log loss by the shares of the one row, shape (D,)."""
        around_BP = self.theta_P + np.array([[0.0], [_NUDGE], [-_NUDGE]]) * self.move_P
        loss_BN, by_share_BND = self.curve.share_gradient(around_BP, inputs)
        log_BD = by_share_BND[:, 0] / loss_BN
        trend_D = log_BD[0] + (log_BD[1] - log_BD[2]) / (2 * _NUDGE)
        return trend_D + self.process.gradient(inputs.share_ND[0], float(inputs.log_step_N[0]))


class ProcessSolver:
    """Learns a curve for all targets at once, then a process for each."""

    convex = False
    notes: Sequence[str] = ()

    def __init__(self) -> None:
        """Begin with nothing learned."""
        self._trend = CurveSolver("joint")
        self._targets: list[_Target] = []

    def learn(self, data: TrainingTable) -> None:
        """Learn from all rows."""
        self._trend.learn(data)
        self._targets = self._around(data, self._trend.fitted, data.seen_VR > 0)

    def _around(self, data: TrainingTable, fitted: Fitted, use_VR: np.ndarray) -> list[_Target]:
        """Return the targets' processes around fitted curves, each from its rows."""
        found = []
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
            move_P = fitted.mean_BP[at] - theta_P + fitted.sd_P * process.shift_P
            found.append(_Target(self._trend.curve, theta_P, move_P, process))
        return found

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), each time learned from some of them.

        With many rows only those left out are predicted, the others are NaN: at fixed
        hyper-parameters that is a block of the inverse that is known.
        """
        if len(data.table) > FEW_ROWS:
            return np.stack([self._without(data, use_R) for use_R in use_FR])
        fitted = self._trend.subsets(data, use_FR)
        count = len(data.table.targets)
        found = []
        for at, use_VR in enumerate(data.seen_in(use_FR)):
            mine = fitted.part(slice(at * count, (at + 1) * count))
            targets = self._around(data, mine, use_VR)
            found.append(np.exp([target.log_loss(data.inputs) for target in targets]).T)
        return np.stack(found)

    def _without(self, data: TrainingTable, use_R: np.ndarray) -> Floats:
        """Return the losses of rows that are not used, given the others, shape (R, V)."""
        loss_RV = np.full((len(use_R), len(self._targets)), np.nan)
        for at, target in enumerate(self._targets):
            seen_R = np.isfinite(data.log_loss_VR[at])
            out_N = ~use_R[seen_R]
            process = target.process
            block = process.inverse_NN[np.ix_(out_N, out_N)]
            error = np.linalg.solve(block, process.weight_N[out_N])
            loss_RV[seen_R & ~use_R, at] = np.exp(data.log_loss_VR[at, seen_R][out_N] - error)
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
        """Return losses (V,) and derivatives (V, D) at one row."""
        loss_V = self.losses(inputs)[0]
        return loss_V, loss_V[:, None] * np.stack([t.gradient(inputs) for t in self._targets])

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return those of the curve, and their intervals."""
        return self._trend.coefficients(data)

    def state_dict(self) -> dict[str, Any]:
        """Return curve, hyper-parameters and rows in JSON types."""
        shared = self._targets[0].process.rows
        same = all(_same_rows(target.process.rows, shared) for target in self._targets)
        return {
            "trend": self._trend.state_dict(),
            "targets": [_target_state(t, alone=not same) for t in self._targets],
            "root": np.round(shared.root_ND, 12).tolist() if same else None,
            "log_step": shared.log_step_N.tolist() if same else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up; the processes are conditioned on their rows again."""
        self._trend.load_state_dict(state["trend"])
        fitted, curve = self._trend.fitted, self._trend.curve
        targets: list[_Target] = []
        for at, given in enumerate(state["targets"]):
            root_ND = np.array(given.get("root", state["root"]))
            log_step_N = np.array(given.get("log_step", state["log_step"]))
            theta_P, log_loss_N = fitted.theta_BP[at], np.array(given["log_loss"])
            inputs = Inputs(root_ND**2, log_step_N)
            rows, _ = _rows(curve, theta_P, fitted.mean_BP[at], fitted.sd_P, inputs, log_loss_N)
            rows = ProcessRows(
                root_ND,
                log_step_N,
                rows.level_N,
                rows.left_N,
                rows.spread_NP,
                np.array(given["doubt"]),
            )
            process = condition(Hyper.of(np.array(given["hyper"])), rows)
            move_P = fitted.mean_BP[at] - theta_P + fitted.sd_P * process.shift_P
            targets.append(_Target(curve, theta_P, move_P, process))
        self._targets = targets


def _same_rows(one: ProcessRows, other: ProcessRows) -> bool:
    """Return whether they are of the same mixtures and steps; missing losses make them differ."""
    return np.array_equal(one.root_ND, other.root_ND) and np.array_equal(
        one.log_step_N, other.log_step_N
    )


def _target_state(target: _Target, *, alone: bool) -> dict[str, Any]:
    """Return one target's part; the losses are what is left plus the curve at its prior mean."""
    rows = target.process.rows
    inputs = Inputs(rows.root_ND**2, rows.log_step_N)
    at_BN, jac_BNP = target.curve.evaluate(target.theta_P[None], inputs)
    sd_shift = target.process.shift_P
    away_P = target.move_P
    # move = mean - theta + sd x shift, and spread = jac x sd.
    mean_N = at_BN[0] + jac_BNP[0] @ away_P - rows.spread_NP @ sd_shift
    own = {"root": rows.root_ND.tolist(), "log_step": rows.log_step_N.tolist()} if alone else {}
    return {
        **own,
        "log_loss": (rows.left_N + mean_N).tolist(),
        "doubt": rows.doubt_N.tolist(),
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
    """Return what the process sees of one target, and the usual size of what the curve misses."""
    at_BN, jac_BNP = curve.evaluate(theta_P[None], inputs)
    at_N, jac_NP = at_BN[0], jac_BNP[0]
    spread = float(at_N.std())
    rows = ProcessRows(
        root_ND=np.sqrt(inputs.share_ND),
        log_step_N=inputs.log_step_N,
        level_N=(at_N - at_N.mean()) / (spread if spread > 0 else 1.0),
        left_N=log_loss_N - at_N - jac_NP @ (mean_P - theta_P),
        spread_NP=jac_NP * sd_P,
        doubt_N=np.ones(len(at_N)),
    )
    return rows, float(np.median(np.abs(log_loss_N - at_N)))


@law("gp")
def _gp() -> FittedLaw:
    return FittedLaw("gp", ProcessSolver())
