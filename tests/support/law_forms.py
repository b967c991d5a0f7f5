"""Small laws in closed form, for tests of what is done with laws: no fit, known coefficients.

Shapes: R rows, D domains, V targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raymix.laws import FitReport, MixtureTable, Objective, Optimum, law, minimize
from raymix.laws.table import Floats


@dataclass
class Form:
    """A law of given numbers; `losses_at` says what they mean."""

    numbers: dict[str, Floats]
    horizon: float = 1000.0
    most: float = 1.0
    kind = "form"
    convex = True
    calls: int = field(default=0, init=False)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(f"d{at}" for at in range(self.size[1]))

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(f"t{at}" for at in range(self.size[0]))

    @property
    def size(self) -> tuple[int, int]:
        """V and D."""
        return self.numbers["c"].shape  # type: ignore[return-value] # a matrix

    @property
    def max_share_D(self) -> Floats:
        return np.full(self.size[1], self.most)

    def deviation(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        return np.zeros((len(share_RD), self.size[0]))

    def losses_at(self, share_D: Floats, step: float) -> tuple[Floats, Floats]:
        raise NotImplementedError

    def fit(self, table: MixtureTable) -> FitReport:
        raise NotImplementedError

    def share_gradient(self, share_D: Floats, step: float | None = None) -> tuple[Floats, Floats]:
        self.calls += 1
        return self.losses_at(share_D, self.horizon if step is None else step)

    def predict(self, share_RD: Floats, step_R: Floats | None = None) -> Floats:
        step_R = np.full(len(share_RD), self.horizon) if step_R is None else step_R
        with np.errstate(all="ignore"):
            pairs = zip(share_RD, step_R, strict=True)
            return np.stack([self.losses_at(*pair)[0] for pair in pairs])

    def minimize(self, objective: Objective) -> Optimum:
        return minimize(self, objective)

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: array.tolist() for name, array in self.numbers.items()}
        return {"numbers": numbers, "most": self.most}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.numbers = {name: np.array(array, float) for name, array in state["numbers"].items()}
        self.most = state["most"]


class Inverse(Form):
    """E + (sum_j c_j r_j^g_j)^-a + B step^-1/2: convex for g <= 1."""

    kind = "test-inverse"

    def losses_at(self, share_D: Floats, step: float) -> tuple[Floats, Floats]:
        c, g, a = (self.numbers[name] for name in "cga")
        total_V = (c * share_D**g).sum(axis=1)
        loss_V = 1 + total_V**-a + step**-0.5
        return loss_V, (-a * total_V ** (-a - 1))[:, None] * c * g * share_D ** (g - 1)


class Exponential(Form):
    """1 + exp(c . r): convex, with optima in corners."""

    kind = "test-exponential"

    def losses_at(self, share_D: Floats, step: float) -> tuple[Floats, Floats]:
        part_V = np.exp(self.numbers["c"] @ share_D)
        return 1 + part_V, part_V[:, None] * self.numbers["c"]


class Own(Form):
    """K r_i^-a of each domain's own share: infinite without one."""

    kind = "test-own"

    def losses_at(self, share_D: Floats, step: float) -> tuple[Floats, Floats]:
        scale, a = np.diag(self.numbers["c"]), self.numbers["a"]
        loss_V = scale * share_D**-a
        return loss_V, np.diag(-a * loss_V / share_D)


class Wells(Form):
    """3 - sum_k depth_k exp(-width |r - center_k|^2): many local optima."""

    kind = "test-wells"
    convex = False

    def losses_at(self, share_D: Floats, step: float) -> tuple[Floats, Floats]:
        away_KD = share_D - self.numbers["c"]
        part_K = self.numbers["depth"] * np.exp(-20 * (away_KD**2).sum(axis=1))
        return np.array([3 - part_K.sum()]), (40 * part_K @ away_KD)[None]

    @property
    def targets(self) -> tuple[str, ...]:
        return ("t0",)


def inverse(n_targets: int, n_domains: int, seed: int = 0) -> Inverse:
    rng = np.random.default_rng(seed)
    shape = (n_targets, n_domains)
    scale = rng.lognormal(0, 1, shape) * n_domains**-0.5
    exponents = rng.uniform(0.1, 0.95, shape)
    return Inverse({"c": scale, "g": exponents, "a": rng.uniform(0.2, 1, n_targets)})


def exponential(n_targets: int, n_domains: int, seed: int = 0) -> Exponential:
    return Exponential({"c": np.random.default_rng(seed).normal(0, 1.5, (n_targets, n_domains))})


def own(n_domains: int, seed: int = 0) -> Own:
    rng = np.random.default_rng(seed)
    scale = np.diag(rng.lognormal(0, 0.5, n_domains))
    return Own({"c": scale, "a": rng.uniform(0.05, 0.6, n_domains)})


@law("test-inverse")
def _inverse(**options: Any) -> Inverse:
    return Inverse({})
