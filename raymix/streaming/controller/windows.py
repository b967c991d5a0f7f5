"""Windows of statistics: pushes of the ranks combined, and shares computed from them.

The statistics of window k give the shares of window k + 2: they are known one window ahead, so no
rank waits for the slowest unless that one is a full window behind.

Letters: D domains, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from raymix._utils.json import jsonable
from raymix.mixers import STATISTICS, DomainStats, Mixer, Shares

LOSS_WEIGHTS = "loss_weights"
"""Key in a log entry's `stats` of the factors of the domains' losses."""

NOTE = "note"
"""Key of the reason why statistics could not be used."""

# Window k is being trained on while the statistics of k - 1 arrive: the first shares they can set
# without anyone waiting are those of k + 1.
_WINDOWS_AHEAD = 2
# Averaged over ranks; tokens are summed, and losses averaged over tokens.
_GRADIENT_FIELDS = tuple(
    STATISTICS[name] for name in sorted(STATISTICS.keys() - {"tokens", "loss"})
)

Array = NDArray[np.float64]


@runtime_checkable
class AdaptiveMixer(Mixer, Protocol):
    """A mixer that learns from statistics, with shares for the windows before the first."""

    @property
    def initial(self) -> Shares:
        """Return the shares of the first two windows, shape (D,)."""
        ...


class Windows:
    """The windows of an adaptive mixer.

    Attributes:
        done: Number of windows whose statistics the mixer has seen: 0 .. done - 1.
    """

    def __init__(self, mixer: Mixer, interval: int, domains: Sequence[str]) -> None:
        if not isinstance(mixer, AdaptiveMixer):
            raise TypeError(f"{type(mixer).__name__} needs statistics but has no `initial` shares")
        self.done = 0
        self._mixer = mixer
        self._interval = interval
        self._domains = domains
        self._shares: dict[int, Shares] = dict.fromkeys(range(_WINDOWS_AHEAD), mixer.initial)
        self._stats: dict[int, dict[str, Any]] = {}
        self._pushes: dict[int, dict[int, DomainStats]] = {}

    @property
    def known_until(self) -> int:
        """Return the first step whose shares are not fixed yet."""
        return (self.done + _WINDOWS_AHEAD) * self._interval

    def shares(self, window: int) -> tuple[Shares, dict[str, Any] | None]:
        """Return the shares of a window below `known_until` and the `stats` of their log entry."""
        return self._shares[window], self._stats.get(window)

    def push(self, window: int, rank: int, stats: DomainStats, *, world_size: int) -> bool:
        """Add a rank's statistics; return whether they completed a window.

        A second push of a rank, or one for a window that is done, is dropped.
        """
        if window < self.done or not 0 <= rank < world_size:
            return False
        # setdefault keeps the first push: Ray may repeat a call, and ranks push again after a
        # restart of the controller.
        self._pushes.setdefault(window, {}).setdefault(rank, stats)
        done = self.done
        # In window order, and several at once if a later window was complete first: the mixer's
        # state depends on the order of its updates.
        while len(self._pushes.get(self.done, ())) == world_size:
            self._finish(self._pushes.pop(self.done))
        return self.done > done

    def drop_unfinished(self) -> None:
        """Drop the statistics of windows that are not complete."""
        self._pushes.clear()

    def drop_shares(self, window: int) -> None:
        """Drop the shares of windows before `window`, which are in the log by now."""
        for old in [w for w in self._shares if w < window]:
            del self._shares[old]
            self._stats.pop(old, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the mixer's, and the shares of windows that are still to come."""
        return {
            "done": self.done,
            "weights": self._shares,
            "stats": self._stats,
            "mixer": self._mixer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.done = int(state["done"])
        self._shares = {int(w): np.asarray(s, np.float64) for w, s in state["weights"].items()}
        self._stats = {int(w): dict(s) for w, s in state["stats"].items()}
        self._pushes.clear()
        self._mixer.load_state_dict(state["mixer"])

    def _finish(self, pushes: Mapping[int, DomainStats]) -> None:
        # In rank order, whatever order they came in: floating-point sums depend on it.
        stats = combine_ranks([pushes[rank] for rank in sorted(pushes)])
        window = self.done + _WINDOWS_AHEAD
        warnings = getattr(self._mixer, "warnings", 0)
        self._shares[window] = np.asarray(self._mixer.update(stats), dtype=np.float64)
        entry_stats = {"window": self.done, **_entry_stats(stats), **self._loss_weights()}
        # `notes` keeps only the last few, so a new note shows in the counter alone.
        if getattr(self._mixer, "warnings", 0) > warnings:
            entry_stats[NOTE] = getattr(self._mixer, "notes", ("",))[-1]
        self._stats[window] = entry_stats
        self.done += 1

    def _loss_weights(self) -> dict[str, Any]:
        """Return the entry of the loss factors that go with the newest shares, if any."""
        # Optional, beside the protocol: most mixers scale no losses.
        loss_weights = getattr(self._mixer, "loss_weights", None)
        factors_D = loss_weights() if loss_weights else None
        return {} if factors_D is None else loss_weight_stats(self._domains, factors_D)


def loss_weight_stats(domains: Sequence[str], factors_D: Shares) -> dict[str, Any]:
    """Return the factors of the domains' losses in the form of a log entry's `stats`."""
    return {LOSS_WEIGHTS: dict(zip(domains, factors_D.tolist(), strict=True))}


def _entry_stats(stats: DomainStats) -> dict[str, Any]:
    """Return the statistics that a log entry records with the shares computed from them."""
    entry_stats: dict[str, Any] = {"tokens": stats.tokens_D.tolist()}
    # Vectors only: a Gram matrix of 10,000 domains would make a log of gigabytes.
    for name in ("loss_D", "grad_norm2_D", "grad_noise_D", "alignment_D"):
        values = getattr(stats, name)
        if values is not None:
            entry_stats[name.removesuffix("_D")] = jsonable(values)
    return entry_stats


def combine_ranks(parts: Sequence[DomainStats]) -> DomainStats:
    """Return the statistics over all ranks.

    Tokens are summed; losses are means over tokens. Gradient statistics are means over the passes
    of all ranks, as those of each pass are unbiased; a rank's NaN is left out of the mean.
    """
    tokens_RD = np.stack([part.tokens_D for part in parts])
    loss_RD = np.stack([part.loss_D for part in parts])
    tokens_D = tokens_RD.sum(axis=0)
    # `where` before the sum: a rank without tokens of a domain has a loss of NaN, and 0 * NaN is
    # NaN.
    nats_D = np.where(tokens_RD > 0, loss_RD * tokens_RD, 0.0).sum(axis=0)
    loss_D = np.full(tokens_D.shape, np.nan)
    np.divide(nats_D, tokens_D, out=loss_D, where=tokens_D > 0)
    means = {name: _mean(parts, name) for name in _GRADIENT_FIELDS}
    return DomainStats(
        step=parts[0].step,
        window=parts[0].window,
        tokens_D=tokens_D,
        loss_D=loss_D,
        probe_passes=sum(part.probe_passes for part in parts),
        **means,
    )


def _mean(parts: Sequence[DomainStats], name: str) -> Array | None:
    """Return the mean of a gradient statistic weighted by passes; None if no rank measured it."""
    # Rank by rank and not stacked: Gram matrices of hundreds of ranks need the memory of two.
    total: Array | None = None
    weight: Array | None = None
    for part in parts:
        value = getattr(part, name)
        if value is None or not part.probe_passes:
            continue
        # Weights by element, as each rank lacks other domains.
        counts = part.probe_passes * np.isfinite(value)
        value = np.where(counts > 0, value, 0.0) * part.probe_passes
        total = value if total is None else total + value
        weight = counts if weight is None else weight + counts
    if total is None or weight is None:
        return None
    mean = np.full(total.shape, np.nan)
    return np.divide(total, weight, out=mean, where=weight > 0)
