"""Aioli-style: shares follow how much the total loss fell per unit of each domain's share.

Chen et al. 2024 (arXiv 2411.05735) model loss_i(t + 1) = loss_i(t) - sum_j A_ij w_j, learn A in
bursts of a few steps on one-hot-like mixtures, and set w_j ~ exp(eta sum_i A_ij). This is NOT that
procedure. There are no bursts with evaluations between them. Every window is itself a probe: a
part of its shares goes to one block of domains in turn, and only the column sums of A, which are
all that the weights use, are estimated, by ridge regression of the falls of the total loss from
window to window on the shares, pulled toward equal gains. Training losses at a changing mixture
and a falling trend make it noisier than the paper's; its own finding is that such methods beat an
even mixture by little. Axes: D domains, M mixed, H windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule, loss_need, loss_of
from raymix.mixers.adaptive.simplex import Floats
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.recipe.adaptive import AioliMixer

# Shares in a checkpoint: 8 windows of 4,096 domains.
_MAX_STORED_SHARES = 32_768
_DECIMALS = 6


class Aioli(Rule):
    """log w = eta K g, with g the estimated gains, shifted to be >= 0 and scaled to sum to 1."""

    def __init__(self, config: AioliMixer, domains: MixedDomains) -> None:
        self._config = config
        self._domains = domains
        self._max_windows = min(config.history, max(4, _MAX_STORED_SHARES // domains.mixed_M.size))
        self._blocks = min(config.blocks, domains.mixed_M.size)
        self._shares: list[list[float]] = []
        self._totals: list[float] = []
        self._turn = 0
        self.needs = frozenset({loss_need(config.loss), "tokens"})
        self.summary = (
            f"by the fall of the {config.loss} loss per share, learned from shares that take "
            f"turns in {self._blocks} blocks: costs {config.explore:.0%} of each window's choice"
        )

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return the losses that are to fall: of the targets if there are any, else of all."""
        targets = self._domains.target_T
        objective = targets if targets.size else self._domains.mixed_M
        return {"loss": loss_of(stats, self._config.loss)[objective]}

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return log weights from the gains estimated so far, shape (M,)."""
        self._shares.append(np.round(self._domains.trained(stats), _DECIMALS).tolist())
        self._totals.append(float(means["loss"].sum()))
        self._shares = self._shares[-self._max_windows :]
        self._totals = self._totals[-self._max_windows :]
        self._turn += 1
        if len(self._totals) < 3:
            return log_A
        gain_M = self._gains()
        # Only differences between gains matter to the shares.
        gain_M = gain_M - min(0.0, float(gain_M.min()))
        total = float(gain_M.sum())
        return self._config.eta * gain_M.size * gain_M / total if total > 0 else log_A

    def explored(self, share_A: Floats) -> Floats:
        """Return the shares with a part of them given to the block whose turn it is."""
        in_turn_A = np.arange(share_A.size) % self._blocks == self._turn % self._blocks
        fraction = self._config.explore
        return (1 - fraction) * share_A + fraction * in_turn_A / in_turn_A.sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the windows remembered and whose turn it is."""
        return {"shares": self._shares, "totals": self._totals, "turn": self._turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._shares = [list(row) for row in state["shares"]]
        self._totals = [float(total) for total in state["totals"]]
        self._turn = int(state["turn"])

    def _gains(self) -> Floats:
        """Return the fall of the total loss per window and unit of share, shape (M,)."""
        share_HM, total_H = np.array(self._shares), np.array(self._totals)
        # Between the middles of two windows, half of each was trained on.
        between_HM = (share_HM[1:] + share_HM[:-1]) / 2
        fall_H = total_H[:-1] - total_H[1:]
        # Centered: the common trend of all shares is the intercept, which is not penalized.
        varied_HM = between_HM - between_HM.mean(axis=0)
        kernel_HH = varied_HM @ varied_HM.T
        penalty = self._config.ridge * float((between_HM**2).sum(axis=1).mean())
        # In the dual: there are fewer windows than domains.
        dual_H = np.linalg.solve(kernel_HH + penalty * np.eye(len(fall_H)), fall_H - fall_H.mean())
        return fall_H.mean() + varied_HM.T @ dual_H


@mixer("aioli")
def _aioli(config: AioliMixer, context: MixerContext) -> Mixer:
    return Adaptive(Aioli(config, MixedDomains.of(context)), config, context)
