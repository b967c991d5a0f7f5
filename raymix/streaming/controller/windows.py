"""Windows of steps: gathers the ranks' statistics and lets an adaptive mixer turn them into shares.

Window k's statistics give the weights of window k + 2: they are known one window ahead, so no
rank ever waits for the slowest unless that one is a whole window behind. Letters: D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from raymix._utils.json import jsonable
from raymix.mixers import STATISTICS, DomainStats, Mixer, Shares

LOSS_WEIGHTS = "loss_weights"
"""Where a log entry's `stats` hold the factors of the domains' losses."""

NOTE = "note"
"""Where they say why statistics could not be used."""

_AHEAD = 2
# What a mean over ranks is taken of.
_MEASURED = tuple(STATISTICS[name] for name in sorted(STATISTICS.keys() - {"tokens", "loss"}))

Array = NDArray[np.float64]


@runtime_checkable
class AdaptiveMixer(Mixer, Protocol):
    """A mixer that learns from statistics; it must say what to begin with."""

    @property
    def initial(self) -> Shares:
        """Return the shares of the first two windows, shape (D,)."""
        ...


class Windows:
    """The windows of an adaptive mixer.

    Attributes:
        done: Windows whose statistics the mixer has seen: 0 .. done - 1.
    """

    def __init__(self, mixer: Mixer, interval: int, domains: Sequence[str]) -> None:
        if not isinstance(mixer, AdaptiveMixer):
            raise TypeError(f"{type(mixer).__name__} needs statistics but has no `initial` shares")
        self.done = 0
        self._mixer = mixer
        self._interval = interval
        self._domains = domains
        self._weights: dict[int, Shares] = dict.fromkeys(range(_AHEAD), mixer.initial)
        self._stats: dict[int, dict[str, Any]] = {}
        self._pushes: dict[int, dict[int, DomainStats]] = {}

    @property
    def known_until(self) -> int:
        """Return the step from which on the weights are not fixed yet."""
        return (self.done + _AHEAD) * self._interval

    def weights(self, window: int) -> tuple[Shares, dict[str, Any] | None]:
        """Return the shares of a window below `known_until`, and what they were derived from."""
        return self._weights[window], self._stats.get(window)

    def push(self, window: int, rank: int, stats: DomainStats, *, world_size: int) -> bool:
        """Take a rank's statistics; return whether a window is complete by that.

        A second push of a rank, or one for a window that is done, is dropped.
        """
        if window < self.done or not 0 <= rank < world_size:
            return False
        self._pushes.setdefault(window, {}).setdefault(rank, stats)
        before = self.done
        while len(self._pushes.get(self.done, ())) == world_size:
            self._finish(self._pushes.pop(self.done))
        return self.done > before

    def forget_unfinished(self) -> None:
        """Drop the statistics of windows that are not complete."""
        self._pushes.clear()

    def forget_weights(self, window: int) -> None:
        """Drop the shares of windows before `window`: they stand in the log by now."""
        for known in [k for k in self._weights if k < window]:
            del self._weights[known]
            self._stats.pop(known, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the mixer's, and the shares of windows that are still to come."""
        return {
            "done": self.done,
            "weights": self._weights,
            "stats": self._stats,
            "mixer": self._mixer.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.done = int(state["done"])
        self._weights = {int(k): np.asarray(w, np.float64) for k, w in state["weights"].items()}
        self._stats = {int(k): dict(s) for k, s in state["stats"].items()}
        self._pushes.clear()
        self._mixer.load_state_dict(state["mixer"])

    def _finish(self, pushes: Mapping[int, DomainStats]) -> None:
        # In the order of ranks, whatever order they came in: sums of floats depend on it.
        stats = combined([pushes[rank] for rank in sorted(pushes)])
        window = self.done + _AHEAD
        warnings = getattr(self._mixer, "warnings", 0)
        self._weights[window] = np.asarray(self._mixer.update(stats), dtype=np.float64)
        shown = {"window": self.done, **_shown(stats), **self._loss_weights()}
        if getattr(self._mixer, "warnings", 0) > warnings:
            shown[NOTE] = getattr(self._mixer, "notes", ("",))[-1]
        self._stats[window] = shown
        self.done += 1

    def _loss_weights(self) -> dict[str, Any]:
        """Return the factors of the domains' losses that go with the newest shares, if any."""
        weights = getattr(self._mixer, "loss_weights", None)
        factors = weights() if weights else None
        return {} if factors is None else by_domain(self._domains, factors)


def by_domain(domains: Sequence[str], factor_D: Shares) -> dict[str, Any]:
    """Return factors of the domains' losses as a log entry's `stats` hold them."""
    return {LOSS_WEIGHTS: dict(zip(domains, factor_D.tolist(), strict=True))}


def _shown(stats: DomainStats) -> dict[str, Any]:
    """Return what the log says of the statistics that weights follow from."""
    shown: dict[str, Any] = {"tokens": stats.tokens_D.tolist()}
    for name in ("loss_D", "grad_norm2_D", "grad_noise_D", "alignment_D"):
        values = getattr(stats, name)
        if values is not None:
            shown[name.removesuffix("_D")] = jsonable(values)
    return shown


def combined(parts: Sequence[DomainStats]) -> DomainStats:
    """Return the statistics of all ranks together.

    Tokens add up; the loss is the mean per token. Gradient statistics are means over the passes
    of all ranks, as those of each pass are unbiased already; where a rank has a NaN, over the
    others.
    """
    tokens_RD = np.stack([part.tokens_D for part in parts])
    loss_RD = np.stack([part.loss_D for part in parts])
    tokens_D = tokens_RD.sum(axis=0)
    nats_D = np.where(tokens_RD > 0, loss_RD * tokens_RD, 0.0).sum(axis=0)
    loss_D = np.full(tokens_D.shape, np.nan)
    np.divide(nats_D, tokens_D, out=loss_D, where=tokens_D > 0)
    measured = {name: _mean(parts, name) for name in _MEASURED}
    return DomainStats(
        step=parts[0].step,
        window=parts[0].window,
        tokens_D=tokens_D,
        loss_D=loss_D,
        probe_passes=sum(part.probe_passes for part in parts),
        **measured,
    )


def _mean(parts: Sequence[DomainStats], name: str) -> Array | None:
    """Return the mean of a gradient statistic, weighted by passes; None where nobody has it.

    One rank after the other, so that hundreds of Gram matrices need the memory of two.
    """
    total: Array | None = None
    weight: Array | None = None
    for part in parts:
        value = getattr(part, name)
        if value is None or not part.probe_passes:
            continue
        counts = part.probe_passes * np.isfinite(value)
        value = np.where(counts > 0, value, 0.0) * part.probe_passes
        total = value if total is None else total + value
        weight = counts if weight is None else weight + counts
    if total is None or weight is None:
        return None
    mean = np.full(total.shape, np.nan)
    return np.divide(total, weight, out=mean, where=weight > 0)
