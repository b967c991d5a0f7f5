"""`Rule`: the part of an adaptive mixer that turns statistics into log weights.

`guardrails.Adaptive` wraps a rule and limits what it proposes. Axes: D domains of the corpus, M
mixed domains, T targets, A what a rule weighs: mixed domains, or groups of domains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raymix.mixers.adaptive.simplex import Floats
from raymix.mixers.base import DomainStats, MixerContext

Indices = NDArray[np.intp]
LossKind = Literal["train", "valid"]


@dataclass(frozen=True, slots=True, eq=False)
class MixedDomains:
    """Indices of the mixed domains and of the targets among the domains of the corpus."""

    mixed_M: Indices
    """Domains that may have a share, shape (M,): neither targets nor empty."""
    target_T: Indices
    """Targets, shape (T,)."""
    rows_per_step: int
    """Sequences in a global batch, b in the papers."""

    @classmethod
    def of(cls, context: MixerContext) -> MixedDomains:
        """Return the indices of a run."""
        mixed_D = context.mixed_D
        may_D = mixed_D & (context.tokens_D > 0)
        # Before a corpus is prepared all counts are 0, and there must be something to mix.
        may_D = may_D if may_D.any() else mixed_D
        return cls(np.flatnonzero(may_D), np.flatnonzero(~mixed_D), context.rows_per_step)

    def trained(self, stats: DomainStats) -> Floats:
        """Return the realized shares of the window, shape (M,); 0 where nothing was trained."""
        tokens_M = stats.tokens_D[self.mixed_M].astype(np.float64)
        # 1.0: an empty window has no shares, and must not divide by zero.
        return tokens_M / max(tokens_M.sum(), 1.0)


class Rule(ABC):
    """How a mixer turns statistics into weights, without floors, caps or averages.

    Attributes:
        needs: The statistics it reads.
        summary: One line for plans and reports: what it follows, what it needs and costs.
        live_A: Which may have weight at all, shape (A,); set by `Adaptive`.
    """

    needs: frozenset[str]
    summary: str
    live_A: NDArray[np.bool_]

    @abstractmethod
    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return the statistics to average over windows, by name; NaN where not measured."""

    @abstractmethod
    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return new log weights, up to a constant, shape (A,).

        Args:
            log_A: Log weights so far, summing to 1 as weights, shape (A,).
            means: The statistics of `measure`, averaged over windows, without NaN.
            stats: The window's own statistics.
        """

    def explored(self, share_A: Floats) -> Floats:
        """Return the shares to sample by, shape (A,), if they differ from the weights."""
        return share_A

    @property
    def loss_weight_A(self) -> Floats | None:
        """Return a weight of each domain's loss, of mean 1, shape (A,); None is 1 for all."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's own state in JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; a rule without one has nothing to read."""
        del state


def products(gram_DD: Floats, weight_D: Floats) -> Floats:
    """Return the inner products with the weighted sum of gradients, shape (D,).

    Domains that were not measured add nothing to the sum; their own product is NaN.
    """
    # The diagonal of a domain that was not measured is NaN, like its row and column.
    known_D = ~np.isnan(np.diagonal(gram_DD))
    product_D = gram_DD @ weight_D
    if np.isnan(product_D).any():
        product_D = np.nan_to_num(gram_DD, nan=0.0) @ weight_D
    return np.where(known_D, product_D, np.nan)


def loss_of(stats: DomainStats, kind: LossKind) -> Floats:
    """Return the training or the held-out loss, shape (D,)."""
    loss_D = stats.loss_D if kind == "train" else stats.valid_loss_D
    if loss_D is None:
        raise TypeError("the window has no held-out loss; the mixer's `needs` asked for it")
    return loss_D


def loss_need(kind: LossKind) -> str:
    """Return the name of a loss in `Mixer.needs`."""
    return "loss" if kind == "train" else "valid_loss"


def required(value: Floats | None) -> Floats:
    """Return a statistic that `Adaptive` has checked to be present."""
    if value is None:
        raise TypeError("the window lacks a statistic that the mixer's `needs` asked for")
    return value
