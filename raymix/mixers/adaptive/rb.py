"""R&B: shares are a softmax of each domain's alignment with the evaluation mixture; memoryless.

arXiv 2505.00358, without its regrouping of the data, which gave it much of its gain: give it a
corpus whose domains are clusters. Axes: D domains, M mixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule, products, required
from raymix.mixers.adaptive.simplex import Floats
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.mixers.by_name import shares_by_name
from raymix.recipe.adaptive import RbMixer


class Rb(Rule):
    """log w = scale x (G p) / |G p|, with G the Gram matrix and p the evaluation mixture."""

    needs = frozenset({"gram"})

    def __init__(self, config: RbMixer, domains: MixedDomains, eval_D: Floats) -> None:
        self._scale = config.scale
        self._domains = domains
        self._eval_D = eval_D
        self.summary = (
            f"by alignment with an evaluation mixture of {np.count_nonzero(eval_D)} domains, from "
            "the Gram matrix: one probe per window, no extra backward"
        )

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return G p, shape (M,)."""
        return {"align": products(required(stats.gram_DD), self._eval_D)[self._domains.mixed_M]}

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return the log weights, shape (M,); the old ones where nothing is aligned."""
        # Scaled to norm 1: alignments shrink over a run, and the shares would flatten with them.
        size = float(np.linalg.norm(means["align"]))
        return self._scale * means["align"] / size if size > 0 else log_A


@mixer("rb")
def _rb(config: RbMixer, context: MixerContext) -> Mixer:
    domains = MixedDomains.of(context)
    if config.eval_shares is None:
        eval_D = np.zeros(len(context.domains))
        eval_D[domains.target_T if domains.target_T.size else domains.mixed_M] = 1.0
        return Adaptive(Rb(config, domains, eval_D / eval_D.sum()), config, context)
    # Without targets: an evaluation mixture may well name them, unlike a mixture to train on.
    free = MixerContext(
        context.domains, context.tokens_D, context.total_tokens, context.total_steps
    )
    eval_D = shares_by_name(config.eval_shares, free, path="mixer.eval_shares")
    return Adaptive(Rb(config, domains, eval_D), config, context)
