"""Regressions of the log loss: `regression` (ridge) and `lightgbm` (boosted trees, an extra).

Shapes: R rows of the table, N new or used rows, D domains, V targets, F subsets, Q features, K
singular values.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymix.errors import LawError
from raymix.laws.base import law
from raymix.laws.models.fitted_law import FittedLaw, TrainingTable
from raymix.laws.models.least_squares import Inputs
from raymix.laws.table import Floats

_PENALTIES = np.logspace(-6, 3, 19)  # per row, of standardized features; two per decade
# Smaller offsets stretch log(r + eps) near 0 so far that one zero share dominates the feature.
_MIN_EPS = 1e-3
_MAX_BOOSTING_ROUNDS = 1000
# Differences are 0 between split points; this is the smallest share that runs can realize.
_DIFFERENCE_STEP = 1e-4


class RidgeSolver:
    """Ridge: log loss = a + b . r + c . log(r + eps), and with steps terms in log s.

    The penalty of each target minimizes the leave-one-out error over rows, which has a closed form
    (Allen's PRESS).
    """

    convex = False
    notes: Sequence[str] = ()

    def __init__(self) -> None:
        """Create an unfitted solver."""
        self._eps = _MIN_EPS
        self._steps = False
        self._mean_Q = self._scale_Q = np.zeros(0)
        self._weight_VQ = np.zeros((0, 0))
        self._intercept_V = self._noise_V = np.zeros(0)

    def _features(self, inputs: Inputs) -> Floats:
        share_ND, log_s_N1 = inputs.share_ND, inputs.log_step_N[:, None]
        log_ND = np.log(share_ND + self._eps)
        step_features = [log_s_N1, log_s_N1**2, share_ND * log_s_N1] if self._steps else []
        return np.concatenate([share_ND, log_ND, *step_features], axis=1)

    def learn(self, data: TrainingTable) -> None:
        """Fit to all rows."""
        share_RD = data.inputs.share_ND
        self._eps = max(_MIN_EPS, float(share_RD[share_RD > 0].min()) / 2)
        self._steps = data.table.has_steps
        # Folds share eps and the scaling of all rows: they depend on shares and steps, not losses.
        features_RQ = self._features(data.inputs)
        self._mean_Q, self._scale_Q = features_RQ.mean(axis=0), features_RQ.std(axis=0)
        self._scale_Q[self._scale_Q < 1e-12] = 1.0
        seen_VR = data.seen_VR > 0
        solutions = [self._solve(data, at, seen_R) for at, seen_R in enumerate(seen_VR)]
        self._weight_VQ = np.stack([weight_Q for weight_Q, _, _ in solutions])
        self._intercept_V = np.array([intercept for _, intercept, _ in solutions])
        self._noise_V = np.array([noise for _, _, noise in solutions])

    def _scaled(self, inputs: Inputs) -> Floats:
        return (self._features(inputs) - self._mean_Q) / self._scale_Q

    def _solve(
        self, data: TrainingTable, at: int, row_R: np.ndarray
    ) -> tuple[Floats, float, float]:
        """Return weights (Q,), intercept, and leave-one-out deviation of one target."""
        y_N = data.log_loss_VR[at, row_R]
        x_NQ = self._scaled(data.inputs.rows(row_R))
        center_Q, intercept = x_NQ.mean(axis=0), float(y_N.mean())
        # One decomposition serves all penalties; normal equations would square the condition
        # number, and shares that sum to 1 make the features collinear.
        u_NK, singular_K, vt_KQ = np.linalg.svd(x_NQ - center_Q, full_matrices=False)
        projection_K = u_NK.T @ (y_N - intercept)
        best = (np.inf, np.zeros(x_NQ.shape[1]))
        for penalty in _PENALTIES * len(y_N):
            shrink_K = singular_K**2 / (singular_K**2 + penalty)
            # PRESS: the leave-one-out residual is the residual over 1 - h, the diagonal of the
            # hat matrix; 1 / N of it is the intercept, which is not penalized.
            hat_N = np.square(u_NK) @ shrink_K + 1 / len(y_N)
            residual_N = (y_N - intercept - u_NK @ (shrink_K * projection_K)) / np.maximum(
                1 - hat_N, 1e-6
            )
            error = float(np.square(residual_N).mean())
            if error < best[0]:  # equal errors: the smaller penalty
                weight_Q = vt_KQ.T @ (singular_K / (singular_K**2 + penalty) * projection_K)
                best = (error, weight_Q)
        return best[1], intercept - float(center_Q @ best[1]), float(np.sqrt(best[0]))

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), fitted to each subset of the rows."""
        x_RQ = self._scaled(data.inputs)
        losses = []
        for use_VR in data.seen_in(use_FR):
            solutions = [self._solve(data, at, use_R) for at, use_R in enumerate(use_VR)]
            losses.append(
                np.exp([intercept + x_RQ @ weight_Q for weight_Q, intercept, _ in solutions]).T
            )
        return np.stack(losses)

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        return np.exp(self._scaled(inputs) @ self._weight_VQ.T + self._intercept_V)

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        return self.losses(inputs) * self._noise_V

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and derivatives by the shares (V, D) at one row."""
        loss_V, count = self.losses(inputs)[0], inputs.share_ND.shape[1]
        weight_VQ = self._weight_VQ / self._scale_Q
        slope_VD = weight_VQ[:, :count]
        slope_VD = slope_VD + weight_VQ[:, count : 2 * count] / (inputs.share_ND[0] + self._eps)
        if self._steps:
            slope_VD = slope_VD + weight_VQ[:, -count:] * inputs.log_step_N[0]
        return loss_V, loss_V[:, None] * slope_VD

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return no coefficients: those of collinear features have no meaning one by one."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the weights in JSON types."""
        return {
            "eps": self._eps,
            "steps": self._steps,
            "mean": self._mean_Q.tolist(),
            "size": self._scale_Q.tolist(),
            "weight": self._weight_VQ.tolist(),
            "base": self._intercept_V.tolist(),
            "noise": self._noise_V.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._eps, self._steps = float(state["eps"]), bool(state["steps"])
        self._mean_Q, self._scale_Q = np.array(state["mean"]), np.array(state["size"])
        self._weight_VQ, self._intercept_V = np.array(state["weight"]), np.array(state["base"])
        self._noise_V = np.array(state["noise"])


class TreeSolver:
    """Boosted trees as in RegMix (2407.01492), with early stopping on a fifth of the training rows.

    A step function has derivative 0 or none: gradients are finite differences, and the optimum is
    a search.
    """

    convex = False
    notes: Sequence[str] = ("Trees have no slope: an optimum is a search among samples",)

    def __init__(self) -> None:
        """Create an unfitted solver."""
        self._models: list[Any] = []
        self._noise_V = np.zeros(0)

    def learn(self, data: TrainingTable) -> None:
        """Fit to all rows."""
        self._models, noise = self._train_models(data, data.seen_VR > 0)
        self._noise_V = np.array(noise)

    def _train_models(
        self, data: TrainingTable, use_VR: np.ndarray
    ) -> tuple[list[Any], list[float]]:
        lightgbm = _lightgbm()
        # RegMix' learning rate. One thread and a seed: histograms summed by several threads differ
        # in the last bits, and so do the splits.
        parameters = {"learning_rate": 0.01, "verbosity": -1, "num_threads": 1, "seed": 0}
        models: list[Any] = []
        noise: list[float] = []
        for loss_R, row_R in zip(data.log_loss_VR, use_VR, strict=True):
            x_NQ, y_N = _tree_features(data.inputs.rows(row_R)), loss_R[row_R]
            order = np.random.default_rng(0).permutation(len(y_N))
            validation, training = order[: len(y_N) // 5], order[len(y_N) // 5 :]
            stopped = lightgbm.train(
                parameters,
                lightgbm.Dataset(x_NQ[training], y_N[training]),
                num_boost_round=_MAX_BOOSTING_ROUNDS,
                valid_sets=[lightgbm.Dataset(x_NQ[validation], y_N[validation])],
                callbacks=[lightgbm.early_stopping(20, verbose=False)],
            )
            residual_N = stopped.predict(x_NQ[validation]) - y_N[validation]
            noise.append(float(np.sqrt(np.mean(np.square(residual_N)))))
            # Trained again on all rows with that number of rounds: a fifth of few runs is many.
            rounds = max(1, stopped.best_iteration)
            models.append(
                lightgbm.train(parameters, lightgbm.Dataset(x_NQ, y_N), num_boost_round=rounds)
            )
        return models, noise

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), fitted to each subset of the rows."""
        x_RQ = _tree_features(data.inputs)
        fold_models = [self._train_models(data, use_VR)[0] for use_VR in data.seen_in(use_FR)]
        return np.stack([np.exp([m.predict(x_RQ) for m in models]).T for models in fold_models])

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        return np.exp([model.predict(_tree_features(inputs)) for model in self._models]).T

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        return self.losses(inputs) * self._noise_V

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and forward differences over 1e-4 of share (V, D) at one row."""
        count = inputs.share_ND.shape[1]
        perturbed_ND = inputs.share_ND + _DIFFERENCE_STEP * np.concatenate(
            [np.zeros((1, count)), np.eye(count)]
        )
        loss_NV = self.losses(Inputs(perturbed_ND, np.repeat(inputs.log_step_N, count + 1)))
        return loss_NV[0], ((loss_NV[1:] - loss_NV[0]) / _DIFFERENCE_STEP).T

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return no coefficients: trees have none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the trees in JSON types."""
        models = [model.model_to_string() for model in self._models]
        return {"models": models, "noise": self._noise_V.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        lightgbm = _lightgbm()
        self._models = [lightgbm.Booster(model_str=text) for text in state["models"]]
        self._noise_V = np.array(state["noise"])


def _tree_features(inputs: Inputs) -> Floats:
    return np.column_stack([inputs.share_ND, inputs.log_step_N])


def _lightgbm() -> Any:
    # By name, at the first fit: the package is optional, and has no type stubs.
    try:
        return importlib.import_module("lightgbm")
    except ImportError as error:
        raise LawError.at(
            "law",
            "lightgbm",
            "lightgbm is not installed",
            fix="Install it: pip install 'raymix[trees]'",
        ) from error


@law("regression")
def _regression() -> FittedLaw:
    return FittedLaw("regression", RidgeSolver())


@law("lightgbm")
def _trees() -> FittedLaw:
    return FittedLaw("lightgbm", TreeSolver(), min_runs=50)
