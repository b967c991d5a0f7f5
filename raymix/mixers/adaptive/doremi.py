"""DoReMi's excess loss and Sheared-LLaMA's loss gap, online on the model itself.

arXiv 2305.10429 and 2310.06694. Differences from DoReMi: the reference is one loss per domain in
the recipe, from an earlier run or e.g. its unigram entropy, not a second model; so the excess is
that of the domain's mean loss, not the mean of each token's; and weights decide what is sampled,
not how a proxy's loss is weighed. Axes: M mixed domains.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule, loss_need, loss_of
from raymix.mixers.adaptive.simplex import Floats
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.mixers.by_name import values_by_name
from raymix.recipe.adaptive import DoremiMixer


class Doremi(Rule):
    """log w += step x max(loss - reference, 0), or without the max (gap)."""

    def __init__(self, config: DoremiMixer, domains: MixedDomains, reference_M: Floats) -> None:
        self._config = config
        self._domains = domains
        self._reference_M = reference_M
        self.needs = frozenset({loss_need(config.loss)})
        self.summary = f"by {config.form} of the {config.loss} loss over a reference: costs nothing"

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return the losses, shape (M,)."""
        return {"loss": loss_of(stats, self._config.loss)[self._domains.mixed_M]}

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return log weights after one step, shape (M,)."""
        # Below the reference there is nothing left to learn, by the paper; `gap` lets shares fall.
        excess_M = means["loss"] - self._reference_M
        if self._config.form == "excess":
            excess_M = np.maximum(excess_M, 0)
        return log_A + self._config.step * excess_M


@mixer("doremi")
def _doremi(config: DoremiMixer, context: MixerContext) -> Mixer:
    domains = MixedDomains.of(context)
    reference_D = values_by_name(config.reference, context, path="mixer.reference")
    return Adaptive(Doremi(config, domains, reference_D[domains.mixed_M]), config, context)
