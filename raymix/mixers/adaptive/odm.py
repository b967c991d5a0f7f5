"""ODM: a bandit over domains, rewarded by the training loss.

Albalak et al. 2023 (arXiv 2312.02406), both updates of its public code. There, one domain is
drawn per step and only it is rewarded; here a window trains on all of them, and every domain that
was read is rewarded once per window. Axes: M mixed domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule
from raymix.mixers.adaptive.simplex import Floats, log_of, softmax
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.recipe.adaptive import OdmMixer

# exp(loss) overflows beyond 700 nats, and a diverged loss is no reward.
_MAX_NATS = 50.0


class Odm(Rule):
    """Rewards and exploration.

    With e_t = min(1 / K, sqrt(ln K / (K t))) after t updates, and R the rewards so far:

    * exp3: R += (loss / scale) / w; w = (1 - K e_t) softmax(e_(t-1) R) + e_t, with the w under
      which the loss was seen: the realized shares of the window.
    * smoothed_mean: R = 0.9 R + 0.1 exp(loss); w = (1 - K e_t) R / sum R + e_t.
    """

    needs = frozenset({"loss", "tokens"})

    def __init__(self, config: OdmMixer, domains: MixedDomains) -> None:
        self._config = config
        self._domains = domains
        self._reward_M = np.zeros(domains.mixed_M.size)
        self._updates = 0
        self.summary = f"a bandit, {config.form}, rewarded by the training loss: costs nothing"

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return the losses, shape (M,)."""
        return {"loss": stats.loss_D[self._domains.mixed_M]}

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return the log weights after one more reward, shape (M,)."""
        trained_M = self._domains.trained(stats)
        # Only domains that were read have a loss of this window.
        seen = np.isfinite(stats.loss_D[self._domains.mixed_M]) & (trained_M > 0)
        loss_M = means["loss"][seen]
        if self._config.form == "exp3":
            # Divided by the share read: importance weighting makes the reward unbiased.
            self._reward_M[seen] += loss_M / self._config.reward_scale / trained_M[seen]
        else:
            keep = self._config.smoothing
            gain_M = np.exp(np.minimum(loss_M, _MAX_NATS))
            self._reward_M[seen] = keep * self._reward_M[seen] + (1 - keep) * gain_M
        self._updates += 1
        # Every domain keeps this share, so that its reward stays current.
        explore = self._exploration(self._updates)
        return log_of((1 - log_A.size * explore) * self._greedy() + explore)

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards and how often they were given."""
        return {"reward": self._reward_M.tolist(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._reward_M = np.array(state["reward"], np.float64)
        self._updates = int(state["updates"])

    def _greedy(self) -> Floats:
        if self._config.form == "exp3":
            return softmax(self._exploration(self._updates - 1) * self._reward_M)
        total = self._reward_M.sum()
        return self._reward_M / total if total > 0 else np.full_like(self._reward_M, 1 / self._k)

    def _exploration(self, updates: int) -> float:
        uniform = 1 / self._k
        return min(uniform, np.sqrt(np.log(self._k) / (self._k * updates))) if updates else uniform

    @property
    def _k(self) -> int:
        return self._reward_M.size


@mixer("odm")
def _odm(config: OdmMixer, context: MixerContext) -> Mixer:
    return Adaptive(Odm(config, MixedDomains.of(context)), config, context)
