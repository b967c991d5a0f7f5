"""PiKE: shares follow each domain's gradient norm against its gradient noise.

Li et al. 2025 (arXiv 2502.06244): Algorithm 1, the bound (8), problem (9), and Balanced-PiKE
(Lemma 3.6). Axes: A mixed domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule, loss_need, loss_of, required
from raymix.mixers.adaptive.simplex import Floats, log_of, softmax, water_fill
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.recipe.adaptive import PikeMixer


class Pike(Rule):
    """The exponents of PiKE.

    With G the squared norm, s2 the noise, b the batch in sequences, and w the weights:

    * simplified: log w += zeta_1 G - zeta_2 / (2 b) s2. With constant statistics it ends in a
      vertex: nothing in it tells how much a domain has already.
    * full: log w += zeta_1 G - zeta_2 gamma w G - zeta_2 / (2 b) s2, the whole mirror step; it
      settles at the optimum of (9).
    * exact_qp: w solves (9) with linear costs zeta_2 / (2 b) s2 - zeta_1 G and curvatures
      zeta_2 gamma G. Only zeta_2 / zeta_1 = L lr / beta matters.

    Unit-free: G and s2 are first divided by mean_j(G_j + s2_j / b), the mean squared norm of a
    batch gradient, so every exponent lies within K times a zeta whatever the model or the noise.
    Estimates of G below 0 count as 0. Balanced (tau > 0): G and s2 are those of the weighted
    losses y L, y = K softmax(tau L): of mean 1, so that tau = 0 is PiKE exactly; the paper's y
    sums to tau instead.
    """

    def __init__(self, config: PikeMixer, domains: MixedDomains) -> None:
        self._config = config
        self._domains = domains
        self._unit_free = config.unit_free and not config.paper_exact
        self._zeta_2 = config.zeta_2
        if config.lr is not None and config.smoothness is not None:
            # The step sizes that the bound (8) prescribes, where its constants are known.
            self._zeta_2 = config.zeta_1 * config.smoothness * config.lr / config.beta
        self._tilt_A = np.ones(domains.mixed_M.size)
        self.needs = frozenset({"grad_norm2", "grad_noise"})
        if config.tau:
            self.needs |= {loss_need(config.loss)}
        tilt = f", balanced with tau {config.tau:g}" if config.tau else ""
        self.summary = (
            f"{config.form} form{tilt}, from gradient norms and noise: one probe per window, "
            "no extra backward"
        )

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return squared norms, noise, and losses where they count."""
        mixed = self._domains.mixed_M
        measured = {
            "norm2": required(stats.grad_norm2_D)[mixed],
            "noise": required(stats.grad_noise_D)[mixed],
        }
        if self._config.tau:
            measured["loss"] = loss_of(stats, self._config.loss)[mixed]
        return measured

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return log weights after one step, shape (A,)."""
        # Unbiased estimates of a small squared norm are negative now and then.
        norm2_A, noise_A = np.maximum(means["norm2"], 0), np.maximum(means["noise"], 0)
        batch = self._domains.rows_per_step
        if self._config.tau:
            # A loss weight of y scales the gradient by y, and norm and noise by y squared.
            self._tilt_A = log_A.size * softmax(self._config.tau * means["loss"])
            norm2_A, noise_A = self._tilt_A**2 * norm2_A, self._tilt_A**2 * noise_A
        if self._unit_free:
            # Mean squared norm of a batch gradient: makes the gains independent of model size.
            size = float((norm2_A + noise_A / batch).mean()) or 1.0
            norm2_A, noise_A = norm2_A / size, noise_A / size
        gain_A = self._config.zeta_1 * norm2_A - self._zeta_2 / (2 * batch) * noise_A
        curve_A = self._zeta_2 * self._config.gamma * norm2_A
        if self._config.form == "exact_qp":
            share_A = np.zeros(gain_A.size)
            # Domains without weight must stay out: the optimum would give them some.
            share_A[self.live_A] = water_fill(-gain_A[self.live_A], curve_A[self.live_A])
            return log_of(share_A)
        if self._config.form == "full":
            gain_A = gain_A - curve_A * np.exp(log_A)
        return log_A + gain_A

    @property
    def loss_weight_A(self) -> Floats | None:
        """Return the weights y of the losses, shape (A,), where they are asked for."""
        return self._tilt_A if self._config.tau and self._config.loss_weights else None

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the losses."""
        return {"tilt": self._tilt_A.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._tilt_A = np.array(state["tilt"], np.float64)


@mixer("pike")
def _pike(config: PikeMixer, context: MixerContext) -> Mixer:
    return Adaptive(Pike(config, MixedDomains.of(context)), config, context)
