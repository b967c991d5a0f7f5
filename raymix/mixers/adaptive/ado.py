"""ADO: shares follow how fast power laws, fitted to the run's own losses, say each domain learns.

Jiang et al. 2024 (arXiv 2410.11820), in the order of its public code after its last correction.
Differences: one point per window, its mean loss, in place of smoothing the losses of every step;
the same Huber fit by reweighted least squares over a grid of powers, which fits all domains at
once; the loss at infinity may be anything from 0 up (the code has at least 1.65 nats, which bytes
are below). As there, n counts the tokens of all domains. Axes: M mixed domains, H points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix._utils.json import jsonable
from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.powerlaw import PowerLaws, fit_power_laws
from raymix.mixers.adaptive.rule import MixedDomains, Rule
from raymix.mixers.adaptive.simplex import Floats, log_of
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.mixers.by_name import shares_by_name
from raymix.mixers.fixed.planned import tempered
from raymix.recipe.adaptive import AdoMixer

# Points of a curve: enough for a fit, few enough for a checkpoint.
_MAX_POINTS = 48
# A law has three parameters.
_MIN_POINTS = 4
_DECIMALS = 5


class Ado(Rule):
    """Preferences and their mean.

    With prior mu, recent shares h and slopes s of the fitted laws:

    preference rho ~ mu h ** 0.5 s, at least `least`; w = 0.9 mean + 0.1 rho, where the mean is
    that of rho over time, begun at mu.
    """

    needs = frozenset({"loss", "tokens"})

    def __init__(self, config: AdoMixer, domains: MixedDomains, prior_M: Floats) -> None:
        self._config = config
        self._domains = domains
        self._prior_M = prior_M
        self._mean_M = prior_M
        self._recent_M = prior_M
        self._points: list[tuple[float, list[float]]] = []
        self._stride = 1
        self._windows = 0
        self._updates = 0
        self._tokens = 0
        self._laws: PowerLaws | None = None
        self.summary = "by the slopes of power laws fitted to the training losses: costs nothing"

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return the losses, shape (M,)."""
        return {"loss": stats.loss_D[self._domains.mixed_M]}

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return log weights from the newest laws, shape (M,); the prior until there are any."""
        trained_M = self._domains.trained(stats)
        newest = self._config.history_ema
        self._recent_M = (1 - newest) * self._recent_M + newest * trained_M
        self._remember(stats, means["loss"])
        if len(self._points) >= _MIN_POINTS and (
            self._laws is None or self._windows % self._config.fit_every == 0
        ):
            n_H = np.array([n for n, _ in self._points])
            self._laws = fit_power_laws(n_H, np.array([losses for _, losses in self._points]))
        if self._laws is None:
            return log_of(self._prior_M)
        self._updates += 1
        rho_M = self._preference(self._laws)
        share_M = (1 - self._config.newest) * self._mean_M + self._config.newest * rho_M
        self._mean_M = self._mean_M + (rho_M - self._mean_M) / (self._updates + 1)
        return log_of(share_M)

    def state_dict(self) -> dict[str, Any]:
        """Return the points, the laws, and what is averaged."""
        laws = self._laws
        arrays = () if laws is None else (laws.floor_M, laws.scale_M, laws.power_M)
        return {
            "points": [[n, jsonable(losses)] for n, losses in self._points],
            "laws": [jsonable(array.tolist()) for array in arrays],
            "mean": self._mean_M.tolist(),
            "recent": self._recent_M.tolist(),
            "stride": self._stride,
            "windows": self._windows,
            "updates": self._updates,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._points = [(float(n), _with_nan(losses)) for n, losses in state["points"]]
        laws = [np.array(_with_nan(values)) for values in state["laws"]]
        self._laws = PowerLaws(*laws) if laws else None
        self._mean_M = np.array(state["mean"], np.float64)
        self._recent_M = np.array(state["recent"], np.float64)
        self._stride = int(state["stride"])
        self._windows = int(state["windows"])
        self._updates = int(state["updates"])
        self._tokens = int(state["tokens"])

    def _remember(self, stats: DomainStats, loss_M: Floats) -> None:
        """Keep the window as a point; when there are many, every other one is dropped."""
        trained = int(stats.tokens_D[self._domains.mixed_M].sum())
        # A mean loss over a window belongs to its middle.
        middle = self._tokens + trained / 2
        self._tokens += trained
        self._windows += 1
        if stats.step < self._config.skip_steps or self._windows % self._stride or not trained:
            return
        seen = np.isfinite(stats.loss_D[self._domains.mixed_M])
        # Enough digits for a fit, few enough for a small state.
        point_M = np.where(seen, np.round(loss_M, _DECIMALS), np.nan)
        self._points.append((middle, point_M.tolist()))
        if len(self._points) > _MAX_POINTS:
            # Halving keeps the points evenly spaced over the whole run.
            self._points = self._points[1::2]
            self._stride *= 2

    def _preference(self, laws: PowerLaws) -> Floats:
        slope_M = laws.slope(max(self._tokens, 1))
        # A curve that could not be fitted learns as fast as the mean of the others.
        known = np.isfinite(slope_M)
        slope_M = np.where(known, slope_M, slope_M[known].mean() if known.any() else 1.0)
        raw_M = self._prior_M * self._recent_M**self._config.history_power * slope_M
        rho_M = raw_M / raw_M.sum() if raw_M.sum() > 0 else self._prior_M
        rho_M = np.maximum(rho_M, min(self._config.least, 0.5 / rho_M.size))
        return rho_M / rho_M.sum()


@mixer("ado")
def _ado(config: AdoMixer, context: MixerContext) -> Mixer:
    domains = MixedDomains.of(context)
    if isinstance(config.initial, dict):
        prior_M = shares_by_name(config.initial, context, path="mixer.initial")[domains.mixed_M]
    elif config.initial == "uniform":
        prior_M = np.full(domains.mixed_M.size, 1 / domains.mixed_M.size)
    else:
        prior_M = tempered(context.tokens_D[domains.mixed_M], 1.0)
    return Adaptive(Ado(config, domains, prior_M), config, context)


def _with_nan(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
