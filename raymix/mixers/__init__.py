"""Mixers decide the shares of the domains: one small pure function per kind.

`build_mixer(recipe.mixer, context)` finds the kind in a registry that other packages extend with
`@mixer("kind")` and the entry-point group `raymix.mixers`. Mixers that need no statistics are
`PlannedMixer`s: their shares are known for every step before the run. The others are `Adaptive`:
a rule within guardrails (floor, cap on change, warm-up, averages; unusable statistics keep the
last weights), once per window of `train.probe_interval` steps.

A gradient probe is one batch that holds every domain, read out of one ordinary backward; "free"
means the losses and counts that training knows anyway. Domains named in `targets` are measured
and never trained on, under every mixer.

| kind | shares | needs | cost | when |
|---|---|---|---|---|
| static, schedule | as written | nothing | none | you know what you want |
| uniform | the same for all | nothing | none | the baseline that is hard to beat |
| proportional | as tokens | nothing | none | one pass over everything |
| temperature | tokens ** (1/T) | nothing | none | many sizes, some repetition |
| epochs | as epochs x tokens | nothing | none | you know how often each is to be read |
| unimax | uniform up to a cap on epochs | nothing | none | many sizes, bounded repetition |
| importance | as near as the target is | nothing | none | a target set, to begin with |
| inherit | a run's own, as its domains change | nothing | none | `train --domains-from` |
| replay | those of an earlier run's log | nothing | none | to repeat an adaptive run exactly |
| pike | gradient norm against noise | grad_norm2, grad_noise | probe | unlike noise, no target |
| pike, tau > 0 | the same, of tilted losses | also loss | probe | the worst domain matters |
| dga | alignment with a target set | alignment, grad_norm2 | probe | a small target set |
| dga, bases | the same, of histograms | group_alignment, group_gram | probe | many clusters |
| dga, grape | alignment with lagging targets | gram, loss | probe | several targets at once |
| doge | alignment with all, or targets | gram | probe | domains that help each other |
| rb | the same, normalized, memoryless | gram | probe | domains that are clusters |
| doremi | loss above a reference | loss or valid_loss | free | an earlier run gives references |
| odm | a bandit on the loss | loss | free | hard domains first, noise and all |
| ado | slope of fitted power laws | loss | free | long runs; needs some windows to begin |
| aioli | fall of loss per share | loss or valid_loss | free, part of the shares | few domains |

Published comparisons find most of these close to an even mixture: run `uniform` beside them.
"""

from raymix.mixers.adaptive import ado, aioli, dga, doge, doremi, odm, pike, rb
from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.powerlaw import PowerLaws, fit_power_laws
from raymix.mixers.adaptive.rule import MixedDomains, Rule
from raymix.mixers.adaptive.simplex import water_fill
from raymix.mixers.base import (
    GRADIENT_STATISTICS,
    STATISTICS,
    DomainStats,
    Mixer,
    MixerContext,
    PlannedMixer,
    Shares,
    build_mixer,
    describe,
    known_mixers,
    mixer,
)
from raymix.mixers.by_name import shares_by_name
from raymix.mixers.fixed import replay
from raymix.mixers.fixed.inherited import inherited_shares
from raymix.mixers.fixed.planned import Planned, tempered, unimax
from raymix.mixers.fixed.replay import Replay
from raymix.recipe.adaptive import AdaptiveModel
from raymix.recipe.shares import MixerModel

__all__ = [
    "GRADIENT_STATISTICS",
    "STATISTICS",
    "Adaptive",
    "AdaptiveModel",
    "DomainStats",
    "MixedDomains",
    "Mixer",
    "MixerContext",
    "MixerModel",
    "Planned",
    "PlannedMixer",
    "PowerLaws",
    "Replay",
    "Rule",
    "Shares",
    "ado",
    "aioli",
    "build_mixer",
    "describe",
    "dga",
    "doge",
    "doremi",
    "fit_power_laws",
    "inherited_shares",
    "known_mixers",
    "mixer",
    "odm",
    "pike",
    "rb",
    "replay",
    "shares_by_name",
    "tempered",
    "unimax",
    "water_fill",
]
