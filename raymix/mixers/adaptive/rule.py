"""What an adaptive mixer is made of: a `Rule` proposes weights, rails (guard.py) hold it.

Shapes: D domains of the corpus, M of them mixed, T targets, A arms: what a rule gives weights to,
the mixed domains as a rule.
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
    """Where the mixed domains and the targets stand among the domains of the corpus."""

    mixed_M: Indices
    """Domains that may have a share, shape (M,): no targets, and not empty."""
    target_T: Indices
    """Targets, shape (T,)."""
    rows_per_step: int
    """Sequences in a global batch: b of the papers."""

    @classmethod
    def of(cls, context: MixerContext) -> MixedDomains:
        """Return the arms of a run."""
        mixed_D = context.mixed_D
        may_D = mixed_D & (context.tokens_D > 0)
        may_D = may_D if may_D.any() else mixed_D
        return cls(np.flatnonzero(may_D), np.flatnonzero(~mixed_D), context.rows_per_step)

    def trained(self, stats: DomainStats) -> Floats:
        """Return the realized shares of the window, shape (M,); 0 where nothing was trained."""
        tokens_M = stats.tokens_D[self.mixed_M].astype(np.float64)
        return tokens_M / max(tokens_M.sum(), 1.0)


class Rule(ABC):
    """How one mixer turns statistics into weights; without floors, caps or averages.

    Attributes:
        needs: The statistics it reads.
        summary: One line for people: what it follows, what it needs and costs.
        live_A: Arms that may have weight at all, shape (A,); set by whoever holds the weights.
    """

    needs: frozenset[str]
    summary: str
    live_A: NDArray[np.bool_]

    @abstractmethod
    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return what is averaged over windows, by name; NaN where it was not measured."""

    @abstractmethod
    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return new log weights, up to a constant, shape (A,).

        Args:
            log_A: Log weights so far, summing to 1 as weights, shape (A,).
            means: What was measured, averaged over windows and without gaps.
            stats: The window's own statistics.
        """

    def explored(self, share_A: Floats) -> Floats:
        """Return the shares to sample by, shape (A,), where they are not the weights."""
        return share_A

    @property
    def loss_weight_A(self) -> Floats | None:
        """Return a factor for each domain's loss, of mean 1, shape (A,); None is 1 for all."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's own state in JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a rule that keeps none has nothing to read."""
        del state


def products(gram_DD: Floats, weight_D: Floats) -> Floats:
    """Return the inner products with the weighted sum of gradients, shape (D,).

    What was not measured counts for nothing in the sum, and its own product is NaN.
    """
    known_D = ~np.isnan(np.diagonal(gram_DD))
    product_D = gram_DD @ weight_D
    if np.isnan(product_D).any():
        product_D = np.nan_to_num(gram_DD, nan=0.0) @ weight_D
    return np.where(known_D, product_D, np.nan)


def loss_of(stats: DomainStats, kind: LossKind) -> Floats:
    """Return the training or the held-out loss, shape (D,)."""
    found = stats.loss_D if kind == "train" else stats.valid_loss_D
    if found is None:
        raise TypeError("the window has no held-out loss; the mixer's `needs` asked for it")
    return found


def loss_need(kind: LossKind) -> str:
    """Return the name of a loss in `Mixer.needs`."""
    return "loss" if kind == "train" else "valid_loss"


def given(value: Floats | None) -> Floats:
    """Return a statistic that the guard has seen to be there."""
    if value is None:
        raise TypeError("the window lacks a statistic that the mixer's `needs` asked for")
    return value
