"""Regressions of the log loss: `regression` (ridge) and `lightgbm` (boosted trees, an extra).

Shapes: R and N rows, D domains, V targets, F subsets, Q features.
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

_PENALTIES = np.logspace(-6, 3, 19)
_MIN_EPS = 1e-3
_ROUNDS = 1000
_NUDGE = 1e-4


class RidgeSolver:
    """log loss = a + b . r + c . log(r + eps), and with steps terms in log s; the penalty by LOO.

    The penalty of each target is the one that predicts rows left out one by one best, which has a
    closed form (Allen's PRESS).
    """

    convex = False
    notes: Sequence[str] = ()

    def __init__(self) -> None:
        """Begin with nothing learned."""
        self._eps = _MIN_EPS
        self._steps = False
        self._mean_Q = self._size_Q = np.zeros(0)
        self._weight_VQ = np.zeros((0, 0))
        self._base_V = self._noise_V = np.zeros(0)

    def _features(self, inputs: Inputs) -> Floats:
        share_ND, log_s_N1 = inputs.share_ND, inputs.log_step_N[:, None]
        log_ND = np.log(share_ND + self._eps)
        late = [log_s_N1, log_s_N1**2, share_ND * log_s_N1] if self._steps else []
        return np.concatenate([share_ND, log_ND, *late], axis=1)

    def learn(self, data: TrainingTable) -> None:
        """Learn from all rows."""
        share_RD = data.inputs.share_ND
        self._eps = max(_MIN_EPS, float(share_RD[share_RD > 0].min()) / 2)
        self._steps = data.table.has_steps
        features_RQ = self._features(data.inputs)
        self._mean_Q, self._size_Q = features_RQ.mean(axis=0), features_RQ.std(axis=0)
        self._size_Q[self._size_Q < 1e-12] = 1.0
        seen_VR = data.seen_VR > 0
        solved = [self._solve(data, at, seen_R) for at, seen_R in enumerate(seen_VR)]
        self._weight_VQ = np.stack([weight_Q for weight_Q, _, _ in solved])
        self._base_V = np.array([base for _, base, _ in solved])
        self._noise_V = np.array([noise for _, _, noise in solved])

    def _scaled(self, inputs: Inputs) -> Floats:
        return (self._features(inputs) - self._mean_Q) / self._size_Q

    def _solve(
        self, data: TrainingTable, at: int, row_R: np.ndarray
    ) -> tuple[Floats, float, float]:
        """Return weights (Q,), the constant, and the deviation of rows left out, of one target."""
        y_N = data.log_loss_VR[at, row_R]
        x_NQ = self._scaled(data.inputs.rows(row_R))
        middle_Q, base = x_NQ.mean(axis=0), float(y_N.mean())
        u_NK, root_K, turn_KQ = np.linalg.svd(x_NQ - middle_Q, full_matrices=False)
        along_K = u_NK.T @ (y_N - base)
        best = (np.inf, np.zeros(x_NQ.shape[1]))
        for penalty in _PENALTIES * len(y_N):
            shrink_K = root_K**2 / (root_K**2 + penalty)
            hat_N = np.square(u_NK) @ shrink_K + 1 / len(y_N)
            off_N = (y_N - base - u_NK @ (shrink_K * along_K)) / np.maximum(1 - hat_N, 1e-6)
            error = float(np.square(off_N).mean())
            if error < best[0]:
                weight_Q = turn_KQ.T @ (root_K / (root_K**2 + penalty) * along_K)
                best = (error, weight_Q)
        return best[1], base - float(middle_Q @ best[1]), float(np.sqrt(best[0]))

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), each time learned from some of them."""
        x_RQ = self._scaled(data.inputs)
        found = []
        for use_VR in data.seen_in(use_FR):
            solved = [self._solve(data, at, use_R) for at, use_R in enumerate(use_VR)]
            found.append(np.exp([base + x_RQ @ weight_Q for weight_Q, base, _ in solved]).T)
        return np.stack(found)

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        return np.exp(self._scaled(inputs) @ self._weight_VQ.T + self._base_V)

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        return self.losses(inputs) * self._noise_V

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and derivatives (V, D) at one row."""
        loss_V, count = self.losses(inputs)[0], inputs.share_ND.shape[1]
        weight_VQ = self._weight_VQ / self._size_Q
        slope_VD = weight_VQ[:, :count]
        slope_VD = slope_VD + weight_VQ[:, count : 2 * count] / (inputs.share_ND[0] + self._eps)
        if self._steps:
            slope_VD = slope_VD + weight_VQ[:, -count:] * inputs.log_step_N[0]
        return loss_V, loss_V[:, None] * slope_VD

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return nothing: a ridge's weights mean little one by one."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the weights in JSON types."""
        return {
            "eps": self._eps,
            "steps": self._steps,
            "mean": self._mean_Q.tolist(),
            "size": self._size_Q.tolist(),
            "weight": self._weight_VQ.tolist(),
            "base": self._base_V.tolist(),
            "noise": self._noise_V.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        self._eps, self._steps = float(state["eps"]), bool(state["steps"])
        self._mean_Q, self._size_Q = np.array(state["mean"]), np.array(state["size"])
        self._weight_VQ, self._base_V = np.array(state["weight"]), np.array(state["base"])
        self._noise_V = np.array(state["noise"])


class TreeSolver:
    """Boosted trees as in RegMix (2407.01492); rounds by a fifth of the rows, never the test.

    A step function has no slope: gradients are differences, and its optimum a search.
    """

    convex = False
    notes: Sequence[str] = ("Trees have no slope: an optimum is a search among samples",)

    def __init__(self) -> None:
        """Begin with nothing learned."""
        self._models: list[Any] = []
        self._noise_V = np.zeros(0)

    def learn(self, data: TrainingTable) -> None:
        """Learn from all rows."""
        self._models, noise = self._grown(data, data.seen_VR > 0)
        self._noise_V = np.array(noise)

    def _grown(self, data: TrainingTable, use_VR: np.ndarray) -> tuple[list[Any], list[float]]:
        lightgbm = _lightgbm()
        parameters = {"learning_rate": 0.01, "verbosity": -1, "num_threads": 1, "seed": 0}
        models: list[Any] = []
        noise: list[float] = []
        for loss_R, row_R in zip(data.log_loss_VR, use_VR, strict=True):
            x_NQ, y_N = _plain(data.inputs.rows(row_R)), loss_R[row_R]
            order = np.random.default_rng(0).permutation(len(y_N))
            held, kept = order[: len(y_N) // 5], order[len(y_N) // 5 :]
            first = lightgbm.train(
                parameters,
                lightgbm.Dataset(x_NQ[kept], y_N[kept]),
                num_boost_round=_ROUNDS,
                valid_sets=[lightgbm.Dataset(x_NQ[held], y_N[held])],
                callbacks=[lightgbm.early_stopping(20, verbose=False)],
            )
            off = first.predict(x_NQ[held]) - y_N[held]
            noise.append(float(np.sqrt(np.mean(np.square(off)))))
            rounds = max(1, first.best_iteration)
            models.append(
                lightgbm.train(parameters, lightgbm.Dataset(x_NQ, y_N), num_boost_round=rounds)
            )
        return models, noise

    def held_out(self, data: TrainingTable, use_FR: np.ndarray) -> Floats:
        """Return losses of all rows, shape (F, R, V), each time learned from some of them."""
        x_RQ = _plain(data.inputs)
        grown = [self._grown(data, use_VR)[0] for use_VR in data.seen_in(use_FR)]
        return np.stack([np.exp([m.predict(x_RQ) for m in models]).T for models in grown])

    def losses(self, inputs: Inputs) -> Floats:
        """Return losses of new rows, shape (N, V)."""
        return np.exp([model.predict(_plain(inputs)) for model in self._models]).T

    def deviations(self, inputs: Inputs) -> Floats:
        """Return standard deviations of the losses of new rows, in nats, shape (N, V)."""
        return self.losses(inputs) * self._noise_V

    def share_gradient(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses (V,) and differences over 1e-4 of share (V, D) at one row."""
        count = inputs.share_ND.shape[1]
        moved = inputs.share_ND + _NUDGE * np.concatenate([np.zeros((1, count)), np.eye(count)])
        loss_NV = self.losses(Inputs(moved, np.repeat(inputs.log_step_N, count + 1)))
        return loss_NV[0], ((loss_NV[1:] - loss_NV[0]) / _NUDGE).T

    def coefficients(self, data: TrainingTable) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return nothing: trees have none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the trees in JSON types."""
        models = [model.model_to_string() for model in self._models]
        return {"models": models, "noise": self._noise_V.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        lightgbm = _lightgbm()
        self._models = [lightgbm.Booster(model_str=text) for text in state["models"]]
        self._noise_V = np.array(state["noise"])


def _plain(inputs: Inputs) -> Floats:
    return np.column_stack([inputs.share_ND, inputs.log_step_N])


def _lightgbm() -> Any:
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
    return FittedLaw("lightgbm", TreeSolver(), least_runs=50)
