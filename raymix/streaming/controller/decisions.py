"""Decisions: which shares begin at a step, those of the mixer or those of a request.

Pure: from the mixer, its windows, the log so far and the requests follow the entries to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raymix.mixers import Mixer, PlannedMixer, Shares
from raymix.sampling import MixtureLog
from raymix.streaming.controller.requests import REQUESTED, ShareRequests, SharesTuple
from raymix.streaming.controller.windows import LOSS_WEIGHTS, NOTE, Windows, loss_weight_stats


class Decision(NamedTuple):
    """Content of the log entry of a step."""

    shares: SharesTuple
    mixer: str
    stats: dict[str, Any] | None


class Decisions:
    """Decides the shares of steps, in their order.

    Args of the constructor:
        mixer: The run's mixer.
        windows: Its windows, if it is adaptive.
        kind: Its name in log entries.
        interval: Steps per window.
        domains: Names of the domains.
    """

    def __init__(
        self,
        mixer: Mixer,
        windows: Windows | None,
        *,
        kind: str,
        interval: int,
        domains: Sequence[str],
    ) -> None:
        self._mixer, self._windows, self._kind = mixer, windows, kind
        self._interval, self._domains = interval, domains

    def mixer_steps(self, first: int, end: int) -> set[int]:
        """Return the steps in [first, end) at which the mixer may change the shares."""
        interval = self._interval
        steps = set(range(-(-first // interval) * interval, end, interval))
        if isinstance(self._mixer, PlannedMixer):
            steps.update(step for step in self._mixer.boundaries if first <= step < end)
        return steps

    def next_change(self, step: int) -> int | None:
        """Return the first step after `step` at which the mixer may change shares, None: never."""
        if self._windows:
            return (step // self._interval + 1) * self._interval
        assert isinstance(self._mixer, PlannedMixer)
        end = max(self._mixer.boundaries, default=0) + 1
        shares_D = self._mixer.planned(step)
        steps = sorted(self.mixer_steps(step + 1, end))
        return next((at for at in steps if (self._mixer.planned(at) != shares_D).any()), None)

    def decide(
        self, step: int, log: MixtureLog, requests: ShareRequests, *, by_mixer: bool
    ) -> Decision | None:
        """Return what begins at `step`; None if the shares stay.

        Args:
            step: The step.
            log: The entries before it.
            requests: The requests, from which nothing is removed.
            by_mixer: Whether the mixer may change its shares at this step.
        """
        shares: SharesTuple | None = None
        stats: dict[str, Any] | None = None
        if by_mixer:
            shares_D, stats = self._mixer_shares(step)
            shares = tuple(shares_D.tolist())
        # A note makes an entry even with equal shares: it says why nothing changed.
        noted = bool(stats and NOTE in stats)
        decision, last = (shares, _loss_factors(stats)), _last_mixer_decision(log)
        changed = shares is not None and (noted or decision != last)
        requested = requests.pending.get(step)
        released = requests.releases_at(step)
        if requested is None and changed:
            requested = requests.held_at(step)
        if requested is not None:
            # The mixer's own shares are logged with the request, so that the same shares in the
            # next window are no change and do not end the request.
            stats = {"mixer": shares, **_request_stats(stats)} if changed else None
            return Decision(requested, REQUESTED, stats)
        if shares is not None and (changed or released):
            return Decision(shares, self._kind, stats)
        if released and last is not None:
            # Between two windows: what the mixer decided for this one.
            stats = None if last[1] is None else {LOSS_WEIGHTS: last[1]}
            return Decision(last[0], self._kind, stats)
        return None

    def _mixer_shares(self, step: int) -> tuple[Shares, dict[str, Any] | None]:
        """Return the mixer's shares at `step` and the `stats` of their log entry."""
        if self._windows:
            return self._windows.shares(step // self._interval)
        assert isinstance(self._mixer, PlannedMixer)
        planned = getattr(self._mixer, "planned_loss_weights", None)
        factors_D = planned(step) if planned else None
        stats = None if factors_D is None else loss_weight_stats(self._domains, factors_D)
        return self._mixer.planned(step), stats


def _last_mixer_decision(log: MixtureLog) -> tuple[SharesTuple, dict[str, float] | None] | None:
    """Return the shares and loss factors the mixer last decided on."""
    for entry in reversed(log.entries):
        if entry.mixer != REQUESTED:
            return entry.weights, _loss_factors(entry.stats)
        if entry.stats:
            return tuple(entry.stats["mixer"]), _loss_factors(entry.stats)
    return None


def _loss_factors(stats: Mapping[str, Any] | None) -> dict[str, float] | None:
    return stats.get(LOSS_WEIGHTS) if stats else None


def _request_stats(stats: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a mixer's `stats` that holds although a request replaces its shares."""
    return {key: stats[key] for key in (LOSS_WEIGHTS, NOTE) if stats and key in stats}
