"""The formulas: BiMix, exponential, additive and joint, each with its derivatives.

Coefficients enter as logarithms where they are positive, so there are no bounds. Shapes: B
problems, N rows, D domains, P coefficients. `r` are shares, `s` steps over their geometric mean.

| curve | loss |
|---|---|
| bimix | (B s^-b + C) / (r_own + eps)^alpha |
| exponential | E + exp(t . r) + B s^-b |
| additive | E + (C_0 + sum_j C_j r_j^g_j)^-a + B s^-b |
| joint | E + (C_0 + sum_j C_j r_j^g_j)^-a s^-k + (sum_j B_j r_j) s^-b |

Sources: BiMix, Ge et al. 2405.14908, with the redundant A left out (A, B, C and k A, B / k, C / k
are the same law); Data Mixing Laws, Ye et al. 2403.16952; Shukor et al. 2507.09404, whose laws
have a = 1 and no C_0, which stands for what every domain teaches a target whatever its share. All g
lie between 0 and 1 (a domain's first tokens teach most), so every loss is convex in the shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from raymix.laws.models.least_squares import Inputs
from raymix.laws.table import Floats

_FLOOR_PART = 0.6
"""Part of the least loss that is usually irreducible."""


def _level(log_loss_BN: Floats, use_BN: Floats) -> tuple[Floats, Floats]:
    """Return the usual floor, and the usual loss above it, shapes (B,)."""
    used_BN = np.where(use_BN > 0, log_loss_BN, np.nan)
    floor_B = _FLOOR_PART * np.exp(np.nanmin(used_BN, axis=1))
    return floor_B, np.exp(np.nanmean(used_BN, axis=1)) - floor_B


def _most(log_loss_BN: Floats, use_BN: Floats) -> Floats:
    """Return the largest loss of each problem, shape (B,)."""
    return np.exp(np.where(use_BN > 0, log_loss_BN, -np.inf).max(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class BiMixCurve:
    """log loss = log(B s^-b + C) - alpha log(r_own + eps); without steps, B is 0."""

    own_V: np.ndarray
    """Index of each target's own domain, shape (V,)."""
    eps: float
    """Added to shares, so that an absent domain has a loss."""
    steps: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the coefficients: logs of alpha and C, and with steps of B and b."""
        return ("log_alpha", "log_C", "log_B", "log_b") if self.steps else ("log_alpha", "log_C")

    def _own(self, count: int, at_B: np.ndarray | None) -> np.ndarray:
        at_B = np.arange(count) if at_B is None else at_B
        return self.own_V[at_B % len(self.own_V)]

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P)."""
        own_B = self._own(len(theta_BP), at_B)
        # Without eps the loss of a domain that is absent is infinite, which is what is meant.
        with np.errstate(divide="ignore"):
            log_r_BN = np.log(inputs.share_ND[:, own_B].T + self.eps)
        alpha_B1, floor_B1 = np.exp(theta_BP[:, :1]), np.exp(theta_BP[:, 1:2])
        power_BN = -alpha_B1 * log_r_BN
        if not self.steps:
            jac = np.stack([power_BN, np.ones_like(power_BN)], axis=2)
            return theta_BP[:, 1:2] + power_BN, jac
        b_B1 = np.exp(theta_BP[:, 3:4])
        rest_BN = np.exp(theta_BP[:, 2:3] - b_B1 * inputs.log_step_N)
        total_BN = rest_BN + floor_B1
        part_BN = rest_BN / total_BN
        slope_BN = -part_BN * b_B1 * inputs.log_step_N
        jac = np.stack([power_BN, floor_B1 / total_BN, part_BN, slope_BN], axis=2)
        return np.log(total_BN) + power_BN, jac

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return wide priors around alpha = 0.1, b = 0.3."""
        used_BN = np.where(use_BN > 0, log_loss_BN, np.nan)
        level_B = np.nanmean(used_BN, axis=1) - 0.2
        columns = [np.full(len(level_B), np.log(0.1)), level_B - 0.4 * self.steps]
        if self.steps:
            columns += [level_B - 1.2, np.full(len(level_B), np.log(0.3))]
        return np.stack(columns, axis=1), np.array([2.0, 2.0, 2.0, 1.0])[: len(columns)]

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return two starts: shallow and steep in the share, slow and fast in steps."""
        other_BP = mean_BP + np.array([-1.5, 0.0, 0.5, 0.7])[: mean_BP.shape[1]]
        return [mean_BP, other_BP]

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        loss_BN = np.exp(self.evaluate(theta_BP, inputs)[0])
        own_B = self._own(len(theta_BP), None)
        slope_BN = -np.exp(theta_BP[:, :1]) * loss_BN / (inputs.share_ND[:, own_B].T + self.eps)
        gradient = np.zeros((*loss_BN.shape, inputs.share_ND.shape[1]))
        gradient[np.arange(len(own_B)), :, own_B] = slope_BN
        return loss_BN, gradient


@dataclass(frozen=True, slots=True, eq=False)
class ExponentialCurve:
    """Loss = E + exp(t . r) + B s^-b (Data Mixing Laws; the factor k is a common shift of t)."""

    domains: tuple[str, ...]
    steps: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the coefficients: log E, the D of t, and with steps logs of B and b."""
        slopes = tuple(f"t.{name}" for name in self.domains)
        return ("log_E", *slopes, *(("log_B", "log_b") if self.steps else ()))

    def _parts(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats, Floats]:
        count = len(self.domains)
        floor_B1 = np.exp(theta_BP[:, :1])
        mixed_BN = np.exp(theta_BP[:, 1 : 1 + count] @ inputs.share_ND.T)
        if not self.steps:
            return floor_B1, mixed_BN, np.zeros((1, 1))
        b_B1 = np.exp(theta_BP[:, -1:])
        return floor_B1, mixed_BN, np.exp(theta_BP[:, -2:-1] - b_B1 * inputs.log_step_N)

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P)."""
        floor_B1, mixed_BN, rest_BN = self._parts(theta_BP, inputs)
        loss_BN = floor_B1 + mixed_BN + rest_BN
        count = len(self.domains)
        jac = np.empty((*loss_BN.shape, theta_BP.shape[1]))
        jac[:, :, 0] = floor_B1 / loss_BN
        jac[:, :, 1 : 1 + count] = (mixed_BN / loss_BN)[:, :, None] * inputs.share_ND
        if self.steps:
            jac[:, :, -2] = rest_BN / loss_BN
            jac[:, :, -1] = -jac[:, :, -2] * np.exp(theta_BP[:, -1:]) * inputs.log_step_N
        return np.log(loss_BN), jac

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return priors: all of t alike at the usual level, with a spread of 2."""
        floor_B, rest_B = _level(log_loss_BN, use_BN)
        part = 0.7 if self.steps else 1.0
        count = len(self.domains)
        columns = [np.log(floor_B), *[np.log(part * rest_B)] * count]
        spread = [1.0, *[2.0] * count]
        if self.steps:
            columns += [np.log(0.3 * rest_B), np.full(len(rest_B), np.log(0.4))]
            spread += [1.0, 0.5]
        return np.stack(columns, axis=1), np.array(spread)

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return two starts: with a high floor and with a low one."""
        low_BP = mean_BP.copy()
        low_BP[:, 0] -= 1.0
        return [mean_BP, low_BP]

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        floor_B1, mixed_BN, rest_BN = self._parts(theta_BP, inputs)
        slopes_BD = theta_BP[:, 1 : 1 + len(self.domains)]
        return floor_B1 + mixed_BN + rest_BN, mixed_BN[:, :, None] * slopes_BD[:, None, :]


@dataclass(frozen=True, slots=True, eq=False)
class AdditiveCurve:
    """Loss = E + S^-a s^-k + B s^-b, S = C_0 + sum_j C_j r_j^g_j; `joint`: B = sum_j B_j r_j."""

    domains: tuple[str, ...]
    own_V: np.ndarray
    """Index of the domain of each target's name, -1 where there is none, shape (V,)."""
    steps: bool
    joint: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the coefficients: logs of E, a, C_0, C, b, B, logits of g, and k itself."""
        own = [f"log_C.{name}" for name in self.domains]
        own += [f"logit_g.{name}" for name in self.domains]
        late = ["log_b", *([f"log_B.{n}" for n in self.domains] if self.joint else ["log_B"])]
        late += ["k"] if self.joint else []
        return ("log_E", "log_a", "log_C_0", *own, *(late if self.steps else []))

    def _split(self, theta_BP: Floats) -> tuple[Floats, ...]:
        count = len(self.domains)
        floor, a, base = (theta_BP[:, i : i + 1] for i in range(3))
        return floor, a, base, theta_BP[:, 3 : 3 + count], theta_BP[:, 3 + count : 3 + 2 * count]

    def _parts(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, ...]:
        """Return T (B, N, D), S (B, N), S^-a s^-k (B, N), B r (B, N, D or 1), s^-b (B, N)."""
        _, log_a, log_base, log_c_BD, logit_g_BD = self._split(theta_BP)
        share_ND = inputs.share_ND
        present_ND = share_ND > 0
        log_r_ND = np.log(np.where(present_ND, share_ND, 1.0))
        term_BND = np.exp(log_c_BD[:, None, :] + expit(logit_g_BD)[:, None, :] * log_r_ND)
        term_BND *= present_ND
        sum_BN = term_BND.sum(axis=2) + np.exp(log_base)
        mixed_BN = np.exp(-np.exp(log_a) * np.log(sum_BN))
        if not self.steps:
            nothing = np.zeros((len(theta_BP), 1, 1))
            return term_BND, sum_BN, mixed_BN, nothing, nothing[:, :, 0]
        at = 3 + 2 * len(self.domains)
        decay_BN = np.exp(-np.exp(theta_BP[:, at : at + 1]) * inputs.log_step_N)
        if not self.joint:
            return term_BND, sum_BN, mixed_BN, np.exp(theta_BP[:, None, at + 1 :]), decay_BN
        mixed_BN = mixed_BN * np.exp(-theta_BP[:, -1:] * inputs.log_step_N)
        late_BND = share_ND * np.exp(theta_BP[:, None, at + 1 : -1])
        return term_BND, sum_BN, mixed_BN, late_BND, decay_BN

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P)."""
        log_floor, log_a, log_base, _, logit_g_BD = self._split(theta_BP)
        term_BND, sum_BN, mixed_BN, late_BND, decay_BN = self._parts(theta_BP, inputs)
        floor_B1, a_B1 = np.exp(log_floor), np.exp(log_a)
        rest_BN = late_BND.sum(axis=2) * decay_BN
        loss_BN = floor_B1 + mixed_BN + rest_BN
        count = len(self.domains)
        jac = np.empty((*loss_BN.shape, theta_BP.shape[1]))
        by_sum_BN = -a_B1 * mixed_BN / (sum_BN * loss_BN)
        jac[:, :, 0] = floor_B1 / loss_BN
        jac[:, :, 1] = -a_B1 * np.log(sum_BN) * mixed_BN / loss_BN
        jac[:, :, 2] = by_sum_BN * np.exp(log_base)
        np.multiply(by_sum_BN[:, :, None], term_BND, out=jac[:, :, 3 : 3 + count])
        log_r_ND = np.log(np.where(inputs.share_ND > 0, inputs.share_ND, 1.0))
        slope_BD = expit(logit_g_BD) * expit(-logit_g_BD)
        steep_BND = slope_BD[:, None, :] * log_r_ND
        at = 3 + 2 * count
        np.multiply(jac[:, :, 3 : 3 + count], steep_BND, out=jac[:, :, 3 + count : at])
        if self.steps:
            b_B1 = np.exp(theta_BP[:, at : at + 1])
            jac[:, :, at] = -b_B1 * inputs.log_step_N * rest_BN / loss_BN
            end = at + 1 + late_BND.shape[2]
            jac[:, :, at + 1 : end] = late_BND * (decay_BN / loss_BN)[:, :, None]
            if self.joint:
                jac[:, :, -1] = -inputs.log_step_N * mixed_BN / loss_BN
        return np.log(loss_BN), jac

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return priors: g near 0.6, a near 1, C alike but e times as large for the own domain."""
        floor_B, rest_B = _level(log_loss_BN, use_BN)
        problems, count = len(floor_B), len(self.domains)
        usual = np.sqrt(inputs.share_ND).sum(axis=1).mean()
        part = 0.7 if self.steps else 1.0
        c_BD = np.repeat((-np.log(part * rest_B) - np.log(usual))[:, None], count, axis=1)
        # A target of which nothing is read costs about the most that was seen.
        base_B = -np.log(part * (_most(log_loss_BN, use_BN) - floor_B))
        own_B = np.tile(self.own_V, problems // len(self.own_V))
        known = np.flatnonzero(own_B >= 0)
        c_BD[known, own_B[known]] += 1.0
        columns = [np.log(floor_B), np.zeros(problems), base_B, *c_BD.T]
        columns += [np.full(problems, 0.5)] * count
        spread = [1.0, 0.5, 0.5, *[1.5] * count, *[1.0] * count]
        if self.steps:
            late = np.log(0.3 * rest_B)
            many = count if self.joint else 1
            columns += [np.full(problems, np.log(0.4)), *[late] * many]
            spread += [0.5, *[1.0] * many]
            columns += [np.zeros(problems)] if self.joint else []
            spread += [0.1] if self.joint else []
        return np.stack(columns, axis=1), np.array(spread)

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return two starts: with the floor of the prior, and with half of it."""
        low_BP = mean_BP.copy()
        low_BP[:, 0] -= 0.7
        low_BP[:, 1] -= 0.4
        return [mean_BP, low_BP]

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        log_floor, log_a, _, log_c_BD, logit_g_BD = self._split(theta_BP)
        term_BND, sum_BN, mixed_BN, late_BND, decay_BN = self._parts(theta_BP, inputs)
        loss_BN = np.exp(log_floor) + mixed_BN + late_BND.sum(axis=2) * decay_BN
        outer_BN = -np.exp(log_a) * mixed_BN / sum_BN
        # At a share of 0 the slope of r^g is infinite for g < 1: it is taken a little above.
        share_ND = np.maximum(inputs.share_ND, 1e-12)
        g_B1D = expit(logit_g_BD)[:, None, :]
        term_BND = np.exp(log_c_BD[:, None, :] + g_B1D * np.log(share_ND))
        gradient = outer_BN[:, :, None] * term_BND * g_B1D / share_ND
        if self.steps and self.joint:
            at = 4 + 2 * len(self.domains)
            gradient += np.exp(theta_BP[:, None, at:-1]) * decay_BN[:, :, None]
        return loss_BN, gradient
