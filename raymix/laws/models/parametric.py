"""Parametric laws: `bimix`, `exponential`, `additive`, `joint`.

The formulas are in `curves`, the fit in `least_squares`; here are the solver around them, its
covariance, bootstrap intervals and state.

Shapes: R rows of the table, N new rows, D domains, V targets, F subsets, P coefficients, K
bootstrap draws. B = F x V problems, subset by subset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from raymix.errors import LawError
from raymix.laws.base import law
from raymix.laws.models.curves import AdditiveCurve, BiMixCurve, ExponentialCurve
from raymix.laws.models.fitted_law import FittedLaw, TrainingTable, own_domains, share_offset
from raymix.laws.models.least_squares import CurveFits, Inputs, bootstrap, fit_curves
from raymix.laws.search.separable import Powers
from raymix.laws.table import Floats, MixtureTable

BOOTSTRAP_DRAWS = 100
"""Draws of the bootstrap: the 5 % quantile is then about the fifth smallest value."""
INTERVAL_LEVEL = 0.9
AnyCurve = BiMixCurve | ExponentialCurve | AdditiveCurve


class CurveSolver:
    """Fits the coefficients of one formula, for all targets and subsets at once."""

    convex = True

    def __init__(self, kind: str, *, eps: float | None = None) -> None:
        """Set the formula; `eps` is BiMix' offset of shares, taken from the table if None."""
        self.kind = kind
        self.notes: Sequence[str] = ()
        self._eps = eps
        self._curve: AnyCurve | None = None
        self._fitted: CurveFits | None = None
        self._covariance_VPP = np.zeros((0, 0, 0))

    @property
    def curve(self) -> AnyCurve:
        """Return the formula with the options of the training table."""
        if self._curve is None:
            raise LawError.at("law", self.kind, "not fitted yet", fix="Call fit first")
        return self._curve

    @property
    def fitted(self) -> CurveFits:
        """Return the fitted coefficients."""
        if self._fitted is None:
            raise LawError.at("law", self.kind, "not fitted yet", fix="Call fit first")
        return self._fitted

    def learn(self, data: TrainingTable) -> None:
        """Fit to all rows."""
        curve = self._make_curve(data.table)
        fitted = fit_curves(curve, data.inputs, data.log_loss_VR, data.seen_VR)
        if not np.isfinite(fitted.theta_BP).all() or not np.isfinite(fitted.cost_B).all():
            raise LawError.at(
                "law", self.kind, "no coefficients fit this table", fix="Try law 'regression'"
            )
        # Assigned after the check: a failed fit leaves the solver as it was.
        self._curve, self._fitted = curve, fitted
        self._covariance_VPP = _covariance(curve, data.inputs, fitted)

    def _make_curve(self, table: MixtureTable) -> AnyCurve:
        own_V, named_V = own_domains(table)
        self.notes = ()
        if self.kind == "bimix":
            if not named_V.all():
                names = [t for t, named in zip(table.targets, named_V, strict=True) if not named]
                listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
                self.notes = (f"No domain is called {listed}: its share is the most telling one's",)
            eps = share_offset(table.share_RD) if self._eps is None else self._eps
            return BiMixCurve(own_V, eps, table.has_steps)
        if self.kind == "exponential":
            return ExponentialCurve(table.domains, table.has_steps)
        joint = self.kind == "joint" and table.has_steps
        # The additive law has a term per domain, so only a match by name justifies a prior for it.
        known_V = np.where(named_V, own_V, -1)
        return AdditiveCurve(table.domains, known_V, table.has_steps, joint)

    def fit_subsets(self, data: TrainingTable, use_FR: np.ndarray) -> CurveFits:
        """Return F x V fits, one per subset and target, started from the fit to all rows."""
        use_BR = data.seen_in(use_FR).reshape(-1, len(data.table)).astype(np.float64)
        y_BR = np.tile(data.log_loss_VR, (len(use_FR), 1))
        # Starting there saves most iterations. The priors come with it: they depend on the level of
        # the losses of all rows, not on the effect of the shares.
        warm_start = self.fitted.tile(len(use_FR))
        return fit_curves(self.curve, data.inputs, y_BR, use_BR, warm_start=warm_start)

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), fitted to each subset of the rows."""
        fitted = self.fit_subsets(data, use_FR)
        loss_BR = np.exp(self.curve.evaluate(fitted.theta_BP, data.inputs)[0])
        return np.swapaxes(loss_BR.reshape(len(use_FR), -1, loss_BR.shape[1]), 1, 2)

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        return np.exp(self.curve.evaluate(self.fitted.theta_BP, inputs)[0]).T

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        # Delta method: the variance J C J' of the log loss, times the loss.
        log_VN, jac_VNP = self.curve.evaluate(self.fitted.theta_BP, inputs)
        variance_VN = ((jac_VNP @ self._covariance_VPP) * jac_VNP).sum(axis=2)
        return (np.exp(log_VN) * np.sqrt(np.maximum(variance_VN, 0))).T

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and derivatives by the shares (V, D) at one row."""
        loss_VN, gradient_VND = self.curve.share_gradient(self.fitted.theta_BP, inputs)
        return loss_VN[:, 0], gradient_VND[:, 0]

    def powers(self, inputs: Inputs) -> Powers | None:
        """Return the losses at one row as powers of one share each; None for other formulas."""
        if not isinstance(self.curve, BiMixCurve):
            return None
        exponent_V = np.exp(self.fitted.theta_BP[:, 0])
        own_V, eps = self.curve.own_V, self.curve.eps
        # From a predicted loss, so that it holds with and without steps.
        scale_V = self.losses(inputs)[0] * (inputs.share_ND[0, own_V] + eps) ** exponent_V
        return Powers(scale_V=scale_V, exponent_V=exponent_V, own_V=own_V, offset=eps)

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return values and 90 % intervals of a bootstrap over runs, by target and coefficient.

        Values are transformed back from logs and logits. Each draw weights whole runs by an
        exponential variable (Rubin's Bayesian bootstrap) and takes one Newton step.
        """
        draw_KN = run_weights(data.table, BOOTSTRAP_DRAWS)
        theta_KVP = bootstrap(self.curve, data.inputs, data.log_loss_VR, self.fitted, draw_KN)
        tail = 50 * (1 - INTERVAL_LEVEL)
        low_VP, high_VP = np.percentile(theta_KVP, (tail, 100 - tail), axis=0)
        return {
            target: {
                name.removeprefix("log_").removeprefix("logit_"): _back_transform(
                    name, value, low, high
                )
                for name, value, low, high in zip(self.curve.names, *rows, strict=True)
            }
            for target, *rows in zip(
                data.table.targets, self.fitted.theta_BP, low_VP, high_VP, strict=True
            )
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the formula and its coefficients in JSON types."""
        curve = self.curve
        own: list[int] = [] if isinstance(curve, ExponentialCurve) else curve.own_V.tolist()
        return {
            "domains": [] if isinstance(curve, BiMixCurve) else list(curve.domains),
            "own": own,
            "eps": curve.eps if isinstance(curve, BiMixCurve) else None,
            "steps": curve.steps,
            "joint": curve.joint if isinstance(curve, AdditiveCurve) else False,
            "names": list(curve.names),
            "theta": self.fitted.theta_BP.tolist(),
            "mean": self.fitted.mean_BP.tolist(),
            "sd": self.fitted.sd_P.tolist(),
            "scale": self.fitted.scale_B.tolist(),
            "covariance": _rounded(self._covariance_VPP),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the formula and its coefficients."""
        own_V = np.array(state["own"], int)
        domains = tuple(state["domains"])
        if self.kind == "bimix":
            self._curve = BiMixCurve(own_V, float(state["eps"]), state["steps"])
        elif self.kind == "exponential":
            self._curve = ExponentialCurve(domains, state["steps"])
        else:
            self._curve = AdditiveCurve(domains, own_V, state["steps"], state["joint"])
        # Row weights and costs are not saved: only fits that continue from here would need them.
        theta_VP, no_weights = np.array(state["theta"]), np.zeros((len(state["theta"]), 0))
        self._fitted = CurveFits(
            theta_VP,
            np.array(state["mean"]),
            np.array(state["sd"]),
            no_weights,
            np.array(state["scale"]),
            np.zeros(len(theta_VP)),
        )
        self._covariance_VPP = np.array(state["covariance"])


def _back_transform(name: str, *values: float) -> tuple[float, float, float]:
    # All inverses increase, so the ends of an interval keep their order.
    inverse = expit if name.startswith("logit_") else np.exp if name.startswith("log_") else float
    value, low, high = (float(inverse(v)) for v in values)
    return value, low, high


def _rounded(matrix_VPP: Floats) -> list[list[list[float]]]:
    """Return nested lists with numbers of twelve digits, to shorten the file."""
    # Rounding may make the matrix indefinite: `deviations` clips variances at 0.
    return [
        [[float(f"{x:.12g}") for x in row] for row in target_rows]
        for target_rows in matrix_VPP.tolist()
    ]


def run_weights(table: MixtureTable, draws: int, *, seed: int = 0) -> Floats:
    """Return bootstrap weights of the rows with mean 1 over runs, equal in a run, shape (K, R)."""
    # Exponential weights are never 0: no draw loses a domain that only one run has.
    names, at_R = np.unique(np.array(table.runs), return_inverse=True)
    weight_KN = np.random.default_rng(seed).standard_exponential((draws, len(names)))
    weight_KN /= weight_KN.mean(axis=1, keepdims=True)
    return weight_KN[:, at_R]


def _covariance(curve: AnyCurve, inputs: Inputs, fitted: CurveFits) -> Floats:
    """Return the covariance of the coefficients by Laplace's approximation, shape (V, P, P)."""
    _, jac_VNP = curve.evaluate(fitted.theta_BP, inputs)
    jac_VNP *= fitted.weight_BN[:, :, None]
    hessian_VPP = np.swapaxes(jac_VNP, 1, 2) @ jac_VNP + np.diag(1 / fitted.sd_P**2)
    return np.linalg.inv(hessian_VPP).astype(np.float64, copy=False)


@law("bimix")
def _bimix(*, eps: float | None = None) -> FittedLaw:
    return FittedLaw("bimix", CurveSolver("bimix", eps=eps))


@law("exponential")
def _exponential() -> FittedLaw:
    return FittedLaw("exponential", CurveSolver("exponential"))


@law("additive")
def _additive() -> FittedLaw:
    return FittedLaw("additive", CurveSolver("additive"))


@law("joint")
def _joint() -> FittedLaw:
    return FittedLaw("joint", CurveSolver("joint"))
