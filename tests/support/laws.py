"""A small law with a known optimum, for tests of what is done with laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix.laws import FitReport, MixtureTable, Objective, Optimum, Score, law
from raymix.laws.table import Floats


class OwnShare:
    """log loss = a + b log(own share) + c log(step) for each loss, by least squares."""

    kind = "own-share-of-tests"
    convex = True

    def __init__(self) -> None:
        self.domains: tuple[str, ...] = ()
        self.targets: tuple[str, ...] = ()
        self.last = 1.0
        self.max_share_D: Floats = np.zeros(0)
        self.coefficient_VP: Floats = np.zeros((0, 3))

    def fit(self, table: MixtureTable) -> FitReport:
        self.domains, self.targets = table.domains, table.targets
        step_R = np.ones(len(table)) if table.step_R is None else table.step_R
        self.last = float(step_R.max())
        self.max_share_D = table.share_RD.max(axis=0)
        self.coefficient_VP = np.array(
            [
                np.linalg.lstsq(self._features(name, table.share_RD, step_R), loss_R, rcond=None)[0]
                for name, loss_R in zip(table.targets, np.log(table.loss_RV).T, strict=True)
            ]
        )
        error_RV = np.abs(self.predict(table.share_RD, step_R) / table.loss_RV - 1)
        scores = {
            name: Score(spearman=0.5, r2=0.5, mre=float(error_RV[:, at].mean()))
            for at, name in enumerate(self.targets)
        }
        return FitReport(
            law=self.kind,
            rows=len(table),
            runs=table.run_count,
            cpu_s=0.0,
            verdict="For tests only.",
            targets=scores,
            ahead=scores if table.has_steps else {},
            nulls={"mean": Score(spearman=np.nan, r2=0.0, mre=0.1)},
            coefficients={
                name: {"share": (b, b - 0.1, b + 0.1)}
                for name, (_, b, _) in zip(self.targets, self.coefficient_VP, strict=True)
            },
        )

    def _features(self, name: str, share_RD: Floats, step_R: Floats) -> Floats:
        own_R = (
            share_RD[:, self.domains.index(name)] if name in self.domains else np.ones(len(step_R))
        )
        return np.stack([np.ones(len(step_R)), np.log(own_R + 1e-3), np.log(step_R)], axis=1)

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        step_R = np.full(len(share_RD), self.last) if step_R is None else step_R
        rows = zip(self.targets, self.coefficient_VP, strict=True)
        return np.exp(
            np.stack([self._features(name, share_RD, step_R) @ c for name, c in rows], axis=1)
        )

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        return 0.01 * self.predict(share_RD, step_R)

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        raise NotImplementedError

    def minimize(self, objective: Objective) -> Optimum:
        names = self.domains
        low_D = np.array([objective.floors.get(name, 0.0) for name in names])
        high_D = np.array([objective.caps.get(name, 1.0) for name in names])
        draws = np.random.default_rng(0).dirichlet(np.ones(len(names)), 4000)
        draws = low_D + (1 - low_D.sum()) * draws
        draws = draws[(draws <= high_D).all(axis=1)]
        step_R = np.full(len(draws), objective.horizon or self.last)
        loss_RV = self.predict(draws, step_R)
        weights = objective.weights or dict.fromkeys(self.targets, 1 / len(self.targets))
        value_R = loss_RV @ np.array([weights.get(name, 0.0) for name in self.targets])
        best = int(value_R.argmin())
        return Optimum(
            shares=dict(zip(names, map(float, draws[best]), strict=True)),
            losses=dict(zip(self.targets, map(float, loss_RV[best]), strict=True)),
            value=float(value_R[best]),
            gap=None,
            method="restarts",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"coefficients": self.coefficient_VP.tolist(), "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coefficient_VP, self.last = np.array(state["coefficients"]), state["last"]


@law(OwnShare.kind)
def _own_share() -> OwnShare:
    return OwnShare()
