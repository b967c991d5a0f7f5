"""What a run will read from each domain, worked out before it starts.

A fluid model of the sampler: shares are followed exactly and a domain that reaches its cap leaves
its share to the others, as in `raymix.sampling`, which differs by a few rows at most. The cost
grows with the number of different mixtures and caps, not with the steps.

Shapes: D domains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymix.mixers import Mixer, MixerContext, PlannedMixer, Shares
from raymix.mixers.fixed.planned import tempered

Floats = NDArray[np.float64]

_MOST_WINDOWS = 2000


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps over which the asked shares stay the same."""

    start: int
    stop: int
    share_D: Shares


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will read."""

    asked_D: Floats
    """Mean share asked of each domain over the run, shape (D,), summing to 1."""
    read_D: Floats
    """Tokens read, shape (D,)."""
    capped_D: Floats
    """Step at which a domain reaches its cap, shape (D,); infinite where it does not."""
    exhausted: float
    """Step at which every domain with a share has reached its cap; infinite if never."""


def mixture_segments(mixer: Mixer, context: MixerContext, window: int) -> list[Segment]:
    """Return the mixtures that `mixer` will ask for, covering all steps.

    A mixer that decides during the run is forecast at its initial shares. One that moves all the
    time (a linear schedule) is sampled once per `window` steps, in at most 2,000 places.
    """
    steps = context.total_steps
    if not isinstance(mixer, PlannedMixer):
        initial = getattr(mixer, "initial", None)
        first_D = tempered(context.tokens_D, 1.0) if initial is None else np.asarray(initial)
        return [Segment(0, steps, first_D)]
    bounds = sorted({0, *(b for b in mixer.boundaries if 0 < b < steps), steps})
    found: list[Segment] = []
    for start, stop in itertools.pairwise(bounds):
        still = np.array_equal(mixer.planned(start), mixer.planned(stop - 1))
        width = stop - start if still else max(window, -(-(stop - start) // _MOST_WINDOWS))
        found += [
            Segment(at, min(at + width, stop), mixer.planned(at))
            for at in range(start, stop, width)
        ]
    return found


def forecast(
    asked: Sequence[Segment], *, tokens_per_step: float, cap_D: Floats | None = None
) -> Forecast:
    """Return what a run reads that asks for the mixtures `asked`.

    Args:
        asked: What the mixer asks for, without gaps.
        tokens_per_step: Tokens of a global batch.
        cap_D: Most tokens of each domain over the run, shape (D,); infinite for no cap.
    """
    n_domains = asked[0].share_D.size
    limit_D = np.full(n_domains, np.inf) if cap_D is None else cap_D
    state = _State(np.zeros(n_domains), np.full(n_domains, np.inf), limit_D)
    steps = asked[-1].stop
    mean_D = sum((s.share_D * (s.stop - s.start) for s in asked), np.zeros(n_domains)) / steps
    for segment in asked:
        reached = state.follow(segment, tokens_per_step)
        if reached < segment.stop:
            return Forecast(mean_D, state.read_D, state.capped_D, reached)
    return Forecast(mean_D, state.read_D, state.capped_D, np.inf)


@dataclass(slots=True)
class _State:
    read_D: Floats
    capped_D: Floats
    limit_D: Floats

    def follow(self, segment: Segment, tokens_per_step: float) -> float:
        """Read through a segment; return the step reached, short of its end if nothing is left."""
        at = float(segment.start)
        for rate_D in self._rates(segment.share_D, tokens_per_step):
            used = rate_D > 0
            if not used.any():
                return at
            left = (self.limit_D[used] - self.read_D[used]) / rate_D[used]
            way = min(float(left.min()), segment.stop - at)
            at += way
            full = np.flatnonzero(used)[left <= way * (1 + 1e-12)]
            self.read_D += rate_D * way
            self.read_D[full] = self.limit_D[full]
            self.capped_D[full] = at
            if segment.stop - at <= 1e-9 * segment.stop:
                return float(segment.stop)
        raise AssertionError("a finite number of domains has a finite number of caps")

    def _rates(self, share_D: Shares, tokens_per_step: float) -> Iterator[Floats]:
        """Yield the tokens per step of each domain, anew after each cap."""
        for _ in range(share_D.size + 1):
            open_D = np.where(self.read_D < self.limit_D, share_D, 0.0)
            total = open_D.sum()
            yield open_D / total * tokens_per_step if total > 0 else open_D
