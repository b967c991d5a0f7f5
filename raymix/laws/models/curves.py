"""Formulas of the parametric laws and their derivatives: BiMix, exponential, additive, joint.

Positive coefficients enter as logarithms, fractions as logits, so the fit has no bounds.

Shapes: B problems, N rows, D domains, V targets, P coefficients. A name with `1`, as `b_B1`, has a
trailing axis of length 1. `r` are shares, `s` steps over their geometric mean.

| curve | loss |
|---|---|
| bimix | (B s^-b + C) / (r_own + eps)^alpha |
| exponential | E + exp(t . r) + B s^-b |
| additive | E + (C_0 + sum_j C_j r_j^g_j)^-a + B s^-b |
| joint | E + (C_0 + sum_j C_j r_j^g_j)^-a s^-k + (sum_j B_j r_j) s^-b |

Sources: BiMix, Ge et al. 2405.14908, without the redundant A (A, B, C and k A, B / k, C / k are the
same law); Data Mixing Laws, Ye et al. 2403.16952; Shukor et al. 2507.09404, whose laws have a = 1
and no C_0 (transfer that does not depend on the shares). All g lie between 0 and 1 (a domain's
first tokens reduce the loss most), so every loss is convex in the shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from raymix.laws.models.least_squares import Inputs
from raymix.laws.table import Floats

_IRREDUCIBLE_FRACTION = 0.6
"""Prior mean of the irreducible loss, as a fraction of the smallest measured loss."""


def _floor_and_excess(log_loss_BN: Floats, use_BN: Floats) -> tuple[Floats, Floats]:
    """Return the prior means of the irreducible loss and of the loss above it, shapes (B,)."""
    used_BN = np.where(use_BN > 0, log_loss_BN, np.nan)
    floor_B = _IRREDUCIBLE_FRACTION * np.exp(np.nanmin(used_BN, axis=1))
    return floor_B, np.exp(np.nanmean(used_BN, axis=1)) - floor_B


def _max_loss(log_loss_BN: Floats, use_BN: Floats) -> Floats:
    """Return the largest used loss of each problem, shape (B,)."""
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
        # Problems are copies of the V targets, one copy per subset: problem b is target b mod V.
        return self.own_V[at_B % len(self.own_V)]

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P)."""
        own_B = self._own(len(theta_BP), at_B)
        # Without eps the loss of an absent domain is infinite, as the formula says.
        with np.errstate(divide="ignore"):
            log_r_BN = np.log(inputs.share_ND[:, own_B].T + self.eps)
        alpha_B1, floor_B1 = np.exp(theta_BP[:, :1]), np.exp(theta_BP[:, 1:2])
        power_BN = -alpha_B1 * log_r_BN
        if not self.steps:
            jac = np.stack([power_BN, np.ones_like(power_BN)], axis=2)
            return theta_BP[:, 1:2] + power_BN, jac
        b_B1 = np.exp(theta_BP[:, 3:4])
        decay_term_BN = np.exp(theta_BP[:, 2:3] - b_B1 * inputs.log_step_N)
        total_BN = decay_term_BN + floor_B1
        decay_fraction_BN = decay_term_BN / total_BN
        slope_BN = -decay_fraction_BN * b_B1 * inputs.log_step_N
        jac = np.stack([power_BN, floor_B1 / total_BN, decay_fraction_BN, slope_BN], axis=2)
        return np.log(total_BN) + power_BN, jac

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return wide priors around alpha = 0.1, b = 0.3, in the range of published fits."""
        used_BN = np.where(use_BN > 0, log_loss_BN, np.nan)
        # A share near 0.13 to the power -0.1 adds 0.2 to the log loss. With steps, the level is
        # split into C (exp(-0.4) = 0.67 of it) and B (exp(-1.2) = 0.3).
        level_B = np.nanmean(used_BN, axis=1) - 0.2
        columns = [np.full(len(level_B), np.log(0.1)), level_B - 0.4 * self.steps]
        if self.steps:
            columns += [level_B - 1.2, np.full(len(level_B), np.log(0.3))]
        return np.stack(columns, axis=1), np.array([2.0, 2.0, 2.0, 1.0])[: len(columns)]

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return two starts: the prior mean, and one flatter in the share and steeper in steps."""
        # The cost has a valley along which the power of the share and that of steps trade off.
        steep_BP = mean_BP + np.array([-1.5, 0.0, 0.5, 0.7])[: mean_BP.shape[1]]
        return [mean_BP, steep_BP]

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        loss_BN = np.exp(self.evaluate(theta_BP, inputs)[0])
        own_B = self._own(len(theta_BP), None)
        # d/dr of (r + eps)^-alpha; the loss depends on no other share.
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
        floor_B1, mixed_BN, decay_term_BN = self._parts(theta_BP, inputs)
        loss_BN = floor_B1 + mixed_BN + decay_term_BN
        count = len(self.domains)
        jac = np.empty((*loss_BN.shape, theta_BP.shape[1]))
        jac[:, :, 0] = floor_B1 / loss_BN
        jac[:, :, 1 : 1 + count] = (mixed_BN / loss_BN)[:, :, None] * inputs.share_ND
        if self.steps:
            jac[:, :, -2] = decay_term_BN / loss_BN
            jac[:, :, -1] = -jac[:, :, -2] * np.exp(theta_BP[:, -1:]) * inputs.log_step_N
        return np.log(loss_BN), jac

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return priors: one mean for all t, the log of the loss above the floor, with sd 2."""
        floor_B, excess_B = _floor_and_excess(log_loss_BN, use_BN)
        # Shares sum to 1, so equal t give exp(t . r) = exp(t): no domain is preferred. With steps
        # the mixture explains 70 % of the excess and the steps 30 %.
        part = 0.7 if self.steps else 1.0
        count = len(self.domains)
        columns = [np.log(floor_B), *[np.log(part * excess_B)] * count]
        spread = [1.0, *[2.0] * count]
        if self.steps:
            columns += [np.log(0.3 * excess_B), np.full(len(excess_B), np.log(0.4))]
            spread += [1.0, 0.5]
        return np.stack(columns, axis=1), np.array(spread)

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return two starts: the floor of the prior mean, and a floor lower by a factor e."""
        # Floor and exponential are nearly interchangeable over a narrow range of losses.
        low_BP = mean_BP.copy()
        low_BP[:, 0] -= 1.0
        return [mean_BP, low_BP]

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        floor_B1, mixed_BN, decay_term_BN = self._parts(theta_BP, inputs)
        slopes_BD = theta_BP[:, 1 : 1 + len(self.domains)]
        return floor_B1 + mixed_BN + decay_term_BN, mixed_BN[:, :, None] * slopes_BD[:, None, :]


@dataclass(frozen=True, slots=True, eq=False)
class AdditiveCurve:
    """Loss = E + S^-a s^-k + B s^-b, S = C_0 + sum_j C_j r_j^g_j; `joint`: B = sum_j B_j r_j.

    Only `joint` has k.
    """

    domains: tuple[str, ...]
    own_V: np.ndarray
    """Index of the domain of each target's name, -1 where there is none, shape (V,)."""
    steps: bool
    joint: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the coefficients: logs of E, a, C_0, C, b, B, logits of g, and k itself."""
        mixed_names = [f"log_C.{name}" for name in self.domains]
        mixed_names += [f"logit_g.{name}" for name in self.domains]
        step_names = ["log_b", *([f"log_B.{n}" for n in self.domains] if self.joint else ["log_B"])]
        step_names += ["k"] if self.joint else []
        return ("log_E", "log_a", "log_C_0", *mixed_names, *(step_names if self.steps else []))

    def _split(self, theta_BP: Floats) -> tuple[Floats, ...]:
        count = len(self.domains)
        floor, a, base = (theta_BP[:, i : i + 1] for i in range(3))
        return floor, a, base, theta_BP[:, 3 : 3 + count], theta_BP[:, 3 + count : 3 + 2 * count]

    def _parts(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, ...]:
        """Return T (B, N, D), S (B, N), S^-a s^-k (B, N), B r (B, N, D or 1), s^-b (B, N)."""
        _, log_a, log_base, log_c_BD, logit_g_BD = self._split(theta_BP)
        share_ND = inputs.share_ND
        # Logs of 1 in place of 0, masked below: 0 x log 0 would be NaN in the Jacobian.
        present_ND = share_ND > 0
        log_r_ND = np.log(np.where(present_ND, share_ND, 1.0))
        term_BND = np.exp(log_c_BD[:, None, :] + expit(logit_g_BD)[:, None, :] * log_r_ND)
        term_BND *= present_ND
        sum_BN = term_BND.sum(axis=2) + np.exp(log_base)
        mixed_BN = np.exp(-np.exp(log_a) * np.log(sum_BN))
        if not self.steps:
            zeros = np.zeros((len(theta_BP), 1, 1))
            return term_BND, sum_BN, mixed_BN, zeros, zeros[:, :, 0]
        at = 3 + 2 * len(self.domains)
        decay_BN = np.exp(-np.exp(theta_BP[:, at : at + 1]) * inputs.log_step_N)
        if not self.joint:
            return term_BND, sum_BN, mixed_BN, np.exp(theta_BP[:, None, at + 1 :]), decay_BN
        mixed_BN = mixed_BN * np.exp(-theta_BP[:, -1:] * inputs.log_step_N)
        step_scale_BND = share_ND * np.exp(theta_BP[:, None, at + 1 : -1])
        return term_BND, sum_BN, mixed_BN, step_scale_BND, decay_BN

    def evaluate(
        self, theta_BP: Floats, inputs: Inputs, at_B: np.ndarray | None = None
    ) -> tuple[Floats, Floats]:
        """Return log losses, shape (B, N), and their Jacobian, shape (B, N, P)."""
        log_floor, log_a, log_base, _, logit_g_BD = self._split(theta_BP)
        term_BND, sum_BN, mixed_BN, step_scale_BND, decay_BN = self._parts(theta_BP, inputs)
        floor_B1, a_B1 = np.exp(log_floor), np.exp(log_a)
        decay_term_BN = step_scale_BND.sum(axis=2) * decay_BN
        loss_BN = floor_B1 + mixed_BN + decay_term_BN
        count = len(self.domains)
        jac = np.empty((*loss_BN.shape, theta_BP.shape[1]))
        by_sum_BN = -a_B1 * mixed_BN / (sum_BN * loss_BN)
        jac[:, :, 0] = floor_B1 / loss_BN
        jac[:, :, 1] = -a_B1 * np.log(sum_BN) * mixed_BN / loss_BN
        jac[:, :, 2] = by_sum_BN * np.exp(log_base)
        # Written in place: (B, N, D) is the largest array of a fit, so no temporary of it.
        np.multiply(by_sum_BN[:, :, None], term_BND, out=jac[:, :, 3 : 3 + count])
        log_r_ND = np.log(np.where(inputs.share_ND > 0, inputs.share_ND, 1.0))
        # g (1 - g), the derivative of the logistic function; 1 - g as expit(-x) keeps its digits.
        slope_BD = expit(logit_g_BD) * expit(-logit_g_BD)
        log_term_slope_BND = slope_BD[:, None, :] * log_r_ND
        at = 3 + 2 * count
        np.multiply(jac[:, :, 3 : 3 + count], log_term_slope_BND, out=jac[:, :, 3 + count : at])
        if self.steps:
            b_B1 = np.exp(theta_BP[:, at : at + 1])
            jac[:, :, at] = -b_B1 * inputs.log_step_N * decay_term_BN / loss_BN
            end = at + 1 + step_scale_BND.shape[2]
            jac[:, :, at + 1 : end] = step_scale_BND * (decay_BN / loss_BN)[:, :, None]
            if self.joint:
                jac[:, :, -1] = -inputs.log_step_N * mixed_BN / loss_BN
        return np.log(loss_BN), jac

    def prior(self, log_loss_BN: Floats, use_BN: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return priors: g near 0.6, a near 1, equal C but e times as large for the own domain."""
        floor_B, excess_B = _floor_and_excess(log_loss_BN, use_BN)
        problems, count = len(floor_B), len(self.domains)
        # With a = 1 and g near 1/2, C = 1 / (excess x sum of roots) predicts the mean loss.
        mean_root_sum = np.sqrt(inputs.share_ND).sum(axis=1).mean()
        part = 0.7 if self.steps else 1.0
        c_BD = np.repeat((-np.log(part * excess_B) - np.log(mean_root_sum))[:, None], count, axis=1)
        # At S = C_0, no share that helps, the loss is about the largest measured one.
        base_B = -np.log(part * (_max_loss(log_loss_BN, use_BN) - floor_B))
        own_B = np.tile(self.own_V, problems // len(self.own_V))
        named = np.flatnonzero(own_B >= 0)
        c_BD[named, own_B[named]] += 1.0
        columns = [np.log(floor_B), np.zeros(problems), base_B, *c_BD.T]
        columns += [np.full(problems, 0.5)] * count
        spread = [1.0, 0.5, 0.5, *[1.5] * count, *[1.0] * count]
        if self.steps:
            log_step_scale_B = np.log(0.3 * excess_B)
            step_terms = count if self.joint else 1
            columns += [np.full(problems, np.log(0.4)), *[log_step_scale_B] * step_terms]
            spread += [0.5, *[1.0] * step_terms]
            # A narrow prior at 0: k is the departure from the additive law and needs evidence.
            columns += [np.zeros(problems)] if self.joint else []
            spread += [0.1] if self.joint else []
        return np.stack(columns, axis=1), np.array(spread)

    def starts(self, mean_BP: Floats) -> list[Floats]:
        """Return two starts: with the floor of the prior, and with half of it."""
        # Floor and exponent a are nearly interchangeable: half the floor goes with a smaller a.
        low_BP = mean_BP.copy()
        low_BP[:, 0] -= 0.7
        low_BP[:, 1] -= 0.4
        return [mean_BP, low_BP]

    def share_gradient(self, theta_BP: Floats, inputs: Inputs) -> tuple[Floats, Floats]:
        """Return losses, shape (B, N), and derivatives by the shares, shape (B, N, D)."""
        log_floor, log_a, _, log_c_BD, logit_g_BD = self._split(theta_BP)
        term_BND, sum_BN, mixed_BN, step_scale_BND, decay_BN = self._parts(theta_BP, inputs)
        loss_BN = np.exp(log_floor) + mixed_BN + step_scale_BND.sum(axis=2) * decay_BN
        outer_BN = -np.exp(log_a) * mixed_BN / sum_BN
        # At a share of 0 the slope of r^g is infinite for g < 1: it is evaluated slightly above.
        share_ND = np.maximum(inputs.share_ND, 1e-12)
        g_B1D = expit(logit_g_BD)[:, None, :]
        term_BND = np.exp(log_c_BD[:, None, :] + g_B1D * np.log(share_ND))
        gradient = outer_BN[:, :, None] * term_BND * g_B1D / share_ND
        if self.steps and self.joint:
            at = 4 + 2 * len(self.domains)
            gradient += np.exp(theta_BP[:, None, at:-1]) * decay_BN[:, :, None]
        return loss_BN, gradient
