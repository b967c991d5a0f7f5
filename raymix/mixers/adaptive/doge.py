"""DoGE: shares follow each domain's alignment with all domains' gradients, or the targets'.

Fan et al. 2023 (arXiv 2310.15393), as in its public code, but for two things: one update per
window, not per step, and online on the model itself, without the proxy run whose mean weights the
paper then trains on (for those, average the mixture log). Axes: D domains, M mixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule, products, required
from raymix.mixers.adaptive.simplex import Floats
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.recipe.adaptive import DogeMixer

# Clip of the score, from the public code.
_MAX_SCORE = 5.0


class Doge(Rule):
    """log w += step x clip(sum_j <g_i, g_j> / mean_i |g_i|, 0, 5)."""

    needs = frozenset({"gram"})

    def __init__(self, config: DogeMixer, domains: MixedDomains) -> None:
        self._config = config
        self._domains = domains
        toward = f"{domains.target_T.size} targets" if domains.target_T.size else "all domains"
        self.summary = (
            f"by alignment with {toward}, from the Gram matrix: one probe per window, no extra "
            "backward"
        )

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return each domain's score before clipping, shape (M,)."""
        gram_DD, mixed = required(stats.gram_DD), self._domains.mixed_M
        against = self._domains.target_T if self._domains.target_T.size else mixed
        # Estimates of a squared norm may be below 0.
        norm_D = np.sqrt(np.maximum(np.diagonal(gram_DD), 0))
        shrink_D = np.ones(norm_D.size)
        if self._config.clip_norm is not None:
            np.divide(self._config.clip_norm, norm_D, out=shrink_D, where=norm_D > 0)
            shrink_D = np.minimum(shrink_D, 1)
        weight_D = np.zeros(norm_D.size)
        weight_D[against] = np.nan_to_num(shrink_D[against])
        # Gradients clipped one by one: each is shrunk, so a product is shrunk twice.
        score_D = shrink_D * products(gram_DD, weight_D)
        if not self._domains.target_T.size and not self._config.self_term:
            # The product of a domain with itself is no help to others.
            score_D -= shrink_D**2 * np.diagonal(gram_DD)
        # The mean norm of domains that were measured makes scores independent of model size.
        known_M = np.isfinite(norm_D[mixed])
        norm = (shrink_D * norm_D)[mixed][known_M].sum() / max(known_M.sum(), 1)
        return {"score": score_D[mixed] / norm if norm > 0 else np.zeros(mixed.size)}

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return log weights after one step, shape (M,)."""
        return log_A + self._config.step * np.clip(means["score"], 0, _MAX_SCORE)


@mixer("doge")
def _doge(config: DogeMixer, context: MixerContext) -> Mixer:
    return Adaptive(Doge(config, MixedDomains.of(context)), config, context)
