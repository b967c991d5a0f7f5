"""Forecast of the tokens that a run reads of each domain.

A fluid model of the sampler: shares are followed exactly, and a domain that reaches its cap leaves
its share to the others, as in `raymix.sampling`, from which it differs by a few rows at most. The
cost grows with the number of different mixtures and caps, not with the number of steps.

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

# Samples of a mixture that changes at every step: bounds the cost of a long linear schedule.
_MAX_SAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps [start, stop) with constant shares."""

    start: int
    stop: int
    share_D: Shares


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens that a run will read."""

    share_D: Floats
    """Mean requested share of each domain over the run, shape (D,), summing to 1."""
    read_D: Floats
    """Tokens read of each domain, shape (D,)."""
    cap_step_D: Floats
    """Step at which a domain reaches its cap, shape (D,); infinite if it does not."""
    exhausted_step: float
    """Step at which all domains with a share have reached their caps; infinite if never."""


def mixture_segments(mixer: Mixer, context: MixerContext, window: int) -> list[Segment]:
    """Return the segments of the shares that `mixer` will request, without gaps.

    An adaptive mixer is forecast at its initial shares. A schedule that changes at every step
    (a linear one) is sampled once per `window` steps, at most 2,000 times between its bounds.
    """
    steps = context.total_steps
    if not isinstance(mixer, PlannedMixer):
        initial = getattr(mixer, "initial", None)
        first_D = tempered(context.tokens_D, 1.0) if initial is None else np.asarray(initial)
        return [Segment(0, steps, first_D)]
    bounds = sorted({0, *(b for b in mixer.boundaries if 0 < b < steps), steps})
    segments: list[Segment] = []
    for start, stop in itertools.pairwise(bounds):
        # Between boundaries a mixture is constant or linear, so equal ends mean constant.
        constant = np.array_equal(mixer.planned(start), mixer.planned(stop - 1))
        width = stop - start if constant else max(window, -(-(stop - start) // _MAX_SAMPLES))
        segments += [
            Segment(step, min(step + width, stop), mixer.planned(step))
            for step in range(start, stop, width)
        ]
    return segments


def forecast(
    segments: Sequence[Segment], *, tokens_per_step: float, cap_D: Floats | None = None
) -> Forecast:
    """Return the tokens that a run reads with the given shares.

    Args:
        segments: The requested shares over all steps, without gaps.
        tokens_per_step: Tokens of a global batch.
        cap_D: Maximum tokens of each domain over the run, shape (D,); infinite for no cap.
    """
    n_domains = segments[0].share_D.size
    limit_D = np.full(n_domains, np.inf) if cap_D is None else cap_D
    reader = _FluidReader(np.zeros(n_domains), np.full(n_domains, np.inf), limit_D)
    steps = segments[-1].stop
    mean_D = sum((s.share_D * (s.stop - s.start) for s in segments), np.zeros(n_domains)) / steps
    for segment in segments:
        reached = reader.read(segment, tokens_per_step)
        if reached < segment.stop:
            return Forecast(mean_D, reader.read_D, reader.cap_step_D, reached)
    return Forecast(mean_D, reader.read_D, reader.cap_step_D, np.inf)


@dataclass(slots=True)
class _FluidReader:
    """Tokens read so far, the steps of caps reached, and the caps in tokens; all of shape (D,)."""

    read_D: Floats
    cap_step_D: Floats
    limit_D: Floats

    def read(self, segment: Segment, tokens_per_step: float) -> float:
        """Read through a segment; return the step reached, before its end if all is exhausted."""
        step = float(segment.start)
        for rate_D in self._rates(segment.share_D, tokens_per_step):
            used_D = rate_D > 0
            if not used_D.any():
                return step
            # Rates are constant until the next domain reaches its cap: jump there at once.
            steps_left = (self.limit_D[used_D] - self.read_D[used_D]) / rate_D[used_D]
            advance = min(float(steps_left.min()), segment.stop - step)
            step += advance
            # Domains whose caps coincide but for rounding; and exactly at the cap from here on, or
            # a remainder of 1e-12 tokens would count as open.
            capped = np.flatnonzero(used_D)[steps_left <= advance * (1 + 1e-12)]
            self.read_D += rate_D * advance
            self.read_D[capped] = self.limit_D[capped]
            self.cap_step_D[capped] = step
            # `step` is a sum of floats and may miss the segment's end by rounding.
            if segment.stop - step <= 1e-9 * segment.stop:
                return float(segment.stop)
        raise AssertionError("a finite number of domains has a finite number of caps")

    def _rates(self, share_D: Shares, tokens_per_step: float) -> Iterator[Floats]:
        """Yield the tokens per step of each domain, again after each cap reached."""
        # Each round but the last closes at least one domain.
        for _ in range(share_D.size + 1):
            open_D = np.where(self.read_D < self.limit_D, share_D, 0.0)
            total = open_D.sum()
            yield open_D / total * tokens_per_step if total > 0 else open_D
