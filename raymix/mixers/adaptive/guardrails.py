"""The rails of every adaptive mixer: floor, cap on change, warm-up, averages, broken statistics.

`Adaptive` holds the weights, in log space, and a rule that proposes new ones. What it adds, in
order: statistics that cannot be used keep the last weights; each statistic is averaged over
windows; in the warm-up the initial shares hold; a floor is mixed in; no log share changes by more
than the cap. With `paper_exact` only the first of these is left. Shapes as in rule.py.
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

_MOST_NOTES = 10
_SAME = 1e-12


@dataclass(frozen=True, slots=True)
class Guardrails:
    """How far a rule is trusted."""

    floor: float = 0.0
    """Part c of (1 - c) w + c / A."""
    max_log_change: float = np.inf
    """Most change of a log share per update."""
    warmup_steps: int = 0
    """Steps whose statistics move nothing."""
    stats_ema: float = 1.0
    """Weight of the newest window in the mean of a statistic."""

    @classmethod
    def of(cls, config: AdaptiveModel) -> Guardrails:
        """Return the rails of a recipe; none in paper-exact mode."""
        if config.paper_exact:
            return cls()
        cap = np.inf if config.max_log_change is None else config.max_log_change
        return cls(config.floor, cap, config.warmup_steps, config.stats_ema)

    def floored(self, share_A: Floats) -> Floats:
        """Return the shares with the floor mixed in, shape (A,)."""
        if not self.floor:
            return share_A
        return (1 - self.floor) * share_A + self.floor / share_A.size

    def held(self, wanted_A: Floats, share_A: Floats) -> Floats:
        """Return the shares nearest to `wanted` that floor and cap allow, shape (A,).

        Args:
            wanted_A: Shares wanted, shape (A,).
            share_A: Shares so far, on or above the floor, shape (A,).
        """
        wanted_A = self.floored(wanted_A)
        if np.isinf(self.max_log_change):
            return wanted_A
        low_A = np.maximum(share_A * np.exp(-self.max_log_change), self.floor / share_A.size)
        high_A = share_A * np.exp(self.max_log_change)
        return within(wanted_A, np.minimum(low_A, share_A), high_A)


class Averages:
    """Bias-corrected exponential means of named arrays, element by element; gaps are passed over.

    What was never measured stands at the mean of what was.
    """

    def __init__(self, newest: float) -> None:
        self._newest = newest
        self._sums: dict[str, tuple[Floats, Floats]] = {}

    def add(self, name: str, value: Floats) -> Floats:
        """Return the mean of `name` with `value` in it; NaN in `value` changes nothing."""
        total, mass = self._sums.get(name, (np.zeros(value.shape), np.zeros(value.shape)))
        seen = ~np.isnan(value)
        kept = np.where(seen, 1 - self._newest, 1.0)
        total = kept * total + np.where(seen, self._newest * value, 0.0)
        mass = kept * mass + np.where(seen, self._newest, 0.0)
        self._sums[name] = total, mass
        known = mass > 0
        mean = np.divide(total, mass, out=np.zeros(value.shape), where=known)
        return mean if known.all() else np.where(known, mean, mean[known].mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON types."""
        return {name: [part.tolist() for part in parts] for name, parts in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._sums = {
            name: (np.array(total, np.float64), np.array(mass, np.float64))
            for name, (total, mass) in state.items()
        }


class Adaptive:
    """A rule between rails: the mixer that `build_mixer` returns for every adaptive kind.

    Attributes:
        needs: The statistics that `update` reads.
        initial: Shares of the first windows, shape (D,).
        summary: One line for people.
        probe_groups: Distributions over domains that the probe is to draw its rows from, shape
            (N, D), for a mixer that weighs groups; else None.
        warnings: Windows whose statistics could not be used.
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
        """Start at the initial shares.

        Args:
            rule: Proposes weights of the mixed domains, or of the groups.
            config: The recipe's section.
            context: What is known of the run.
            groups_ND: Distributions over domains, shape (N, D), if the rule weighs those.
            ema: Weight of the newest weights in the average that is sampled by.
        """
        self.needs = rule.needs | {"tokens"}
        self.probe_groups = groups_ND
        self.summary = f"{config.kind}: {rule.summary}"
        self.warnings = 0
        self.notes: tuple[str, ...] = ()
        self._rule = rule
        self._rails = Guardrails.of(config)
        self._averages = Averages(self._rails.stats_ema)
        self._arms = MixedDomains.of(context)
        self._n_domains = len(context.domains)
        self._ema = ema
        share_A = self._rails.floored(_initial(config, context, self._arms, groups_ND))
        self._log_A = log_of(share_A)
        # What begins without weight never gets one by a rule: only a floor gives it one.
        rule.live_A = share_A > 0
        self._sampled_A = share_A
        self._loss_weight_A: Floats | None = None
        self._shares_D = self._spread(share_A)
        self.initial = self._shares_D

    def update(self, stats: DomainStats) -> Shares:
        """Return the shares of the next window, shape (D,), read-only.

        Statistics that are missing or not finite change nothing and are counted in `warnings`.
        A domain that was not measured keeps its last mean.
        """
        measured = self._usable(stats)
        if measured is None:
            return self._shares_D
        means = {name: self._averages.add(name, value) for name, value in measured.items()}
        proposed_A = self._rule.propose(self._log_A, means, stats)
        if np.isnan(proposed_A).any() or not np.isfinite(proposed_A[self._rule.live_A]).any():
            self._warn(stats, "the mixer's weights came out as no numbers")
            return self._shares_D
        if stats.step + stats.window > self._rails.warmup_steps:
            self._move(proposed_A)
        return self._shares_D

    def loss_weights(self) -> Shares | None:
        """Return the factor of each domain's loss in training, of mean 1, shape (D,); None: all 1.

        They go with the shares that `update` returned last.
        """
        if self._loss_weight_A is None:
            return None
        weight_D = np.ones(self._n_domains)
        weight_D[self._arms.mixed_M] = self._loss_weight_A
        return weight_D

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON types: weights, sampled average, means, the rule's own."""
        weight_A = self._loss_weight_A
        return {
            # A share of 0 has no finite logarithm, and JSON no infinity.
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
        """Continue from a state, exactly."""
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
        if self._rails.floor or not np.isinf(self._rails.max_log_change):
            log_A = log_of(self._rails.held(np.exp(log_A), np.exp(self._log_A)))
        self._log_A = log_A
        self._loss_weight_A = self._rule.loss_weight_A
        share_A = np.exp(log_A)
        self._sampled_A = (1 - self._ema) * self._sampled_A + self._ema * share_A
        shares_D = self._spread(self._rule.explored(self._sampled_A))
        # Rounding is no change of mind: it would add an entry to the mixture log every window.
        if np.abs(shares_D - self._shares_D).max() > _SAME:
            self._shares_D = shares_D

    def _spread(self, share_A: Floats) -> Shares:
        """Return shares of arms as shares of all domains, shape (D,), read-only."""
        if self.probe_groups is not None:
            share_D = share_A @ self.probe_groups
        else:
            share_D = np.zeros(self._n_domains)
            share_D[self._arms.mixed_M] = share_A
        return _read_only(share_D / share_D.sum())

    def _usable(self, stats: DomainStats) -> dict[str, Floats] | None:
        """Return what the rule measures, None (and a note) if it is not to be trusted."""
        missing = [need for need in self.needs if getattr(stats, STATISTICS[need]) is None]
        if missing:
            self._warn(stats, f"without {', '.join(sorted(missing))}")
            return None
        trained_M = stats.tokens_D[self._arms.mixed_M] > 0
        if not np.isfinite(stats.loss_D[self._arms.mixed_M][trained_M]).all():
            self._warn(stats, "a loss is not finite")
            return None
        measured = self._rule.measure(stats)
        for name, value in measured.items():
            if np.isinf(value).any() or np.isnan(value).all():
                self._warn(stats, f"{name} is not finite")
                return None
        return measured

    def _warn(self, stats: DomainStats, wrong: str) -> None:
        self.warnings += 1
        end = stats.step + stats.window
        note = f"steps {stats.step} to {end - 1}: {wrong}; the weights stay as they were"
        self.notes = (*self.notes, note)[-_MOST_NOTES:]


def _initial(
    config: AdaptiveModel, context: MixerContext, arms: MixedDomains, groups_ND: Floats | None
) -> Floats:
    """Return the shares that the recipe begins with, shape (A,)."""
    if groups_ND is not None:
        return np.full(len(groups_ND), 1 / len(groups_ND))
    if config.initial == "uniform":
        return np.full(arms.mixed_M.size, 1 / arms.mixed_M.size)
    if config.initial == "proportional":
        return tempered(context.tokens_D[arms.mixed_M], 1.0)
    share_D = shares_by_name(config.initial, context, path="mixer.initial")
    share_M = share_D[arms.mixed_M]
    if share_M.sum() < share_D.sum() - _SAME:
        empty = next(i for i in np.flatnonzero(share_D) if i not in arms.mixed_M)
        path = f"mixer.initial.{context.domains[empty]}"
        raise RecipeError.at(path, float(share_D[empty]), "the domain has no tokens")
    return share_M


def _read_only(share_D: Shares) -> Shares:
    share_D.setflags(write=False)
    return share_D
