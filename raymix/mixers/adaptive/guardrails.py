"""Guardrails of adaptive mixers: floor, cap on change, warm-up, averages, unusable statistics.

`Adaptive` keeps the weights in log space and wraps a rule that proposes new ones. In this order:
unusable statistics leave the weights as they are; each statistic is averaged over windows; during
warm-up the initial shares hold; a floor is mixed in; no log share changes by more than the cap.
With `paper_exact` only the first of these applies. Axes as in rule.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymix.errors import RecipeError
from raymix.mixers.adaptive.rule import MixedDomains, Rule
from raymix.mixers.adaptive.simplex import Floats, log_normalized, log_of, within
from raymix.mixers.base import STATISTICS, DomainStats, MixerContext, Shares
from raymix.mixers.by_name import shares_by_name
from raymix.mixers.fixed.planned import tempered
from raymix.recipe.adaptive import AdaptiveModel

_MAX_NOTES = 10
# Smaller changes of a share are rounding.
_MIN_CHANGE = 1e-12


@dataclass(frozen=True, slots=True)
class Guardrails:
    """Limits on what a rule proposes."""

    floor: float = 0.0
    """c of (1 - c) w + c / A."""
    max_log_change: float = np.inf
    """Largest change of a log share per update, in nats."""
    warmup_steps: int = 0
    """Steps at the beginning whose statistics change no share."""
    stats_ema: float = 1.0
    """Weight of the newest window in the mean of a statistic."""

    @classmethod
    def of(cls, config: AdaptiveModel) -> Guardrails:
        """Return the guardrails of a recipe; none with `paper_exact`."""
        if config.paper_exact:
            return cls()
        cap = np.inf if config.max_log_change is None else config.max_log_change
        return cls(config.floor, cap, config.warmup_steps, config.stats_ema)

    def floored(self, share_A: Floats) -> Floats:
        """Return the shares with the floor mixed in, shape (A,)."""
        if not self.floor:
            return share_A
        return (1 - self.floor) * share_A + self.floor / share_A.size

    def limited(self, target_A: Floats, share_A: Floats) -> Floats:
        """Return the shares nearest to `target` that floor and cap allow, shape (A,).

        Args:
            target_A: Proposed shares, shape (A,).
            share_A: Shares so far, on or above the floor, shape (A,).
        """
        target_A = self.floored(target_A)
        if np.isinf(self.max_log_change):
            return target_A
        # The present shares are feasible: they lie between both limits, and sum to 1.
        low_A = np.maximum(share_A * np.exp(-self.max_log_change), self.floor / share_A.size)
        high_A = share_A * np.exp(self.max_log_change)
        return within(target_A, np.minimum(low_A, share_A), high_A)


class Averages:
    """Bias-corrected exponential means of named arrays, element by element; NaN is skipped.

    An element that was never measured gets the mean of those that were.
    """

    def __init__(self, newest: float) -> None:
        self._newest = newest
        self._sums: dict[str, tuple[Floats, Floats]] = {}

    def add(self, name: str, value: Floats) -> Floats:
        """Return the mean of `name` with `value` in it; NaN in `value` changes nothing."""
        total, mass = self._sums.get(name, (np.zeros(value.shape), np.zeros(value.shape)))
        seen = ~np.isnan(value)
        # Elements without a new value keep sum and mass, so their mean stays as it is.
        decay = np.where(seen, 1 - self._newest, 1.0)
        total = decay * total + np.where(seen, self._newest * value, 0.0)
        mass = decay * mass + np.where(seen, self._newest, 0.0)
        self._sums[name] = total, mass
        known = mass > 0
        mean = np.divide(total, mass, out=np.zeros(value.shape), where=known)
        return mean if known.all() else np.where(known, mean, mean[known].mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON types."""
        return {name: [part.tolist() for part in parts] for name, parts in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._sums = {
            name: (np.array(total, np.float64), np.array(mass, np.float64))
            for name, (total, mass) in state.items()
        }


class Adaptive:
    """A rule within guardrails: the mixer that `build_mixer` returns for every adaptive kind.

    Attributes:
        needs: The statistics that `update` reads.
        initial: Shares of the first windows, shape (D,).
        summary: One line for plans and reports.
        probe_groups: Distributions over domains from which the probe draws its rows, shape (N, D),
            for a mixer that weighs groups; else None.
        warnings: Number of windows whose statistics could not be used.
        notes: The last few of them in words.
    """

    def __init__(
        self,
        rule: Rule,
        config: AdaptiveModel,
        context: MixerContext,
        *,
        groups_ND: Floats | None = None,
        ema: float = 1.0,
    ) -> None:
        """Start with the initial shares.

        Args:
            rule: Proposes weights of the mixed domains, or of the groups.
            config: The recipe's section.
            context: What is known of the run.
            groups_ND: Distributions over domains, shape (N, D), if the rule weighs groups.
            ema: Weight of the newest weights in the average by which domains are sampled.
        """
        self.needs = rule.needs | {"tokens"}
        self.probe_groups = groups_ND
        self.summary = f"{config.kind}: {rule.summary}"
        self.warnings = 0
        self.notes: tuple[str, ...] = ()
        self._rule = rule
        self._guardrails = Guardrails.of(config)
        self._averages = Averages(self._guardrails.stats_ema)
        self._domains = MixedDomains.of(context)
        self._n_domains = len(context.domains)
        self._ema = ema
        share_A = self._guardrails.floored(_initial(config, context, self._domains, groups_ND))
        # Log space: hundreds of multiplicative updates would underflow small shares.
        self._log_A = log_of(share_A)
        # A multiplicative update never moves a share of 0; only the floor does.
        rule.live_A = share_A > 0
        self._sampled_A = share_A
        self._loss_weight_A: Floats | None = None
        self._shares_D = self._spread(share_A)
        self.initial = self._shares_D

    def update(self, stats: DomainStats) -> Shares:
        """Return the shares of the next window, shape (D,), read-only.

        Missing or non-finite statistics change nothing and are counted in `warnings`. A domain
        that was not measured keeps its last mean.
        """
        measured = self._usable(stats)
        if measured is None:
            return self._shares_D
        # Averaged even during warm-up, so that the first update has more than one window behind it.
        means = {name: self._averages.add(name, value) for name, value in measured.items()}
        proposed_A = self._rule.propose(self._log_A, means, stats)
        if np.isnan(proposed_A).any() or not np.isfinite(proposed_A[self._rule.live_A]).any():
            self._warn(stats, "the proposed weights are not finite")
            return self._shares_D
        if stats.step + stats.window > self._guardrails.warmup_steps:
            self._move(proposed_A)
        return self._shares_D

    def loss_weights(self) -> Shares | None:
        """Return the weight of each domain's training loss, of mean 1, shape (D,); None: all 1.

        They belong to the shares that `update` returned last.
        """
        if self._loss_weight_A is None:
            return None
        weight_D = np.ones(self._n_domains)
        weight_D[self._domains.mixed_M] = self._loss_weight_A
        return weight_D

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON types: weights, sampled average, means, the rule's state."""
        weight_A = self._loss_weight_A
        return {
            # JSON has no infinity; None stands for the logarithm of a share of 0.
            "log": [None if np.isneginf(x) else x for x in self._log_A.tolist()],
            "sampled": self._sampled_A.tolist(),
            "shares": self._shares_D.tolist(),
            "loss_weights": None if weight_A is None else weight_A.tolist(),
            "means": self._averages.state_dict(),
            "warnings": self.warnings,
            "notes": list(self.notes),
            "rule": self._rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, bit by bit."""
        self._log_A = np.array([-np.inf if x is None else x for x in state["log"]])
        self._sampled_A = np.array(state["sampled"], np.float64)
        self._shares_D = _read_only(np.array(state["shares"], np.float64))
        weights = state["loss_weights"]
        self._loss_weight_A = None if weights is None else np.array(weights, np.float64)
        self._averages.load_state_dict(state["means"])
        self.warnings = int(state["warnings"])
        self.notes = tuple(state["notes"])
        self._rule.load_state_dict(state["rule"])

    def _move(self, proposed_A: Floats) -> None:
        log_A = log_normalized(np.where(self._rule.live_A, proposed_A, -np.inf))
        if self._guardrails.floor or not np.isinf(self._guardrails.max_log_change):
            log_A = log_of(self._guardrails.limited(np.exp(log_A), np.exp(self._log_A)))
        self._log_A = log_A
        self._loss_weight_A = self._rule.loss_weight_A
        share_A = np.exp(log_A)
        # Sampling follows a running mean; the weights themselves do not (DGA).
        self._sampled_A = (1 - self._ema) * self._sampled_A + self._ema * share_A
        shares_D = self._spread(self._rule.explored(self._sampled_A))
        # Differences by rounding would add an entry to the mixture log in every window.
        if np.abs(shares_D - self._shares_D).max() > _MIN_CHANGE:
            self._shares_D = shares_D

    def _spread(self, share_A: Floats) -> Shares:
        """Return weights as shares of all domains, shape (D,), read-only."""
        if self.probe_groups is not None:
            share_D = share_A @ self.probe_groups
        else:
            share_D = np.zeros(self._n_domains)
            share_D[self._domains.mixed_M] = share_A
        return _read_only(share_D / share_D.sum())

    def _usable(self, stats: DomainStats) -> dict[str, Floats] | None:
        """Return the statistics of the rule; None, with a note, if they cannot be used."""
        # A rank without a probe sends no gradient statistics in that window.
        missing = [need for need in self.needs if getattr(stats, STATISTICS[need]) is None]
        if missing:
            self._warn(stats, f"without {', '.join(sorted(missing))}")
            return None
        # A diverged loss must not steer the mixture, even for rules that do not read losses.
        trained_M = stats.tokens_D[self._domains.mixed_M] > 0
        if not np.isfinite(stats.loss_D[self._domains.mixed_M][trained_M]).all():
            self._warn(stats, "a loss is not finite")
            return None
        measured = self._rule.measure(stats)
        for name, value in measured.items():
            if np.isinf(value).any() or np.isnan(value).all():
                self._warn(stats, f"{name} is not finite")
                return None
        return measured

    def _warn(self, stats: DomainStats, problem: str) -> None:
        self.warnings += 1
        end = stats.step + stats.window
        note = f"steps {stats.step} to {end - 1}: {problem}; the weights stay as they were"
        self.notes = (*self.notes, note)[-_MAX_NOTES:]


def _initial(
    config: AdaptiveModel, context: MixerContext, domains: MixedDomains, groups_ND: Floats | None
) -> Floats:
    """Return the initial shares of the recipe, shape (A,)."""
    if groups_ND is not None:
        return np.full(len(groups_ND), 1 / len(groups_ND))
    if config.initial == "uniform":
        return np.full(domains.mixed_M.size, 1 / domains.mixed_M.size)
    if config.initial == "proportional":
        return tempered(context.tokens_D[domains.mixed_M], 1.0)
    share_D = shares_by_name(config.initial, context, path="mixer.initial")
    share_M = share_D[domains.mixed_M]
    if share_M.sum() < share_D.sum() - _MIN_CHANGE:
        empty = next(i for i in np.flatnonzero(share_D) if i not in domains.mixed_M)
        path = f"mixer.initial.{context.domains[empty]}"
        raise RecipeError.at(path, float(share_D[empty]), "the domain has no tokens")
    return share_M


def _read_only(share_D: Shares) -> Shares:
    # Returned without a copy at every window.
    share_D.setflags(write=False)
    return share_D
