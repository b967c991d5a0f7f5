"""What decides the mixture: one small pure function per kind, behind the `Mixer` seam.

`build_mixer(recipe.mixer, context)` finds the kind in a registry that other packages extend with
`@mixer("kind")` and the entry-point group `raymix.mixers`. Mixers that need no statistics are
`PlannedMixer`s: their shares are known for every step before the run.
"""

from raymix.mixers.base import (
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
from raymix.mixers.planned import Planned, shares_by_name, tempered, unimax

__all__ = [
    "DomainStats",
    "Mixer",
    "MixerContext",
    "Planned",
    "PlannedMixer",
    "Shares",
    "build_mixer",
    "describe",
    "known_mixers",
    "mixer",
    "shares_by_name",
    "tempered",
    "unimax",
]
