"""Feedback of a loop on the steps it trained: losses by domain, and a mixer's statistics.

Axes: D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raymix.errors import RecipeError, TrainingError
from raymix.loader.collectives import Collectives
from raymix.loader.loss_sums import LossSums, WindowSums
from raymix.loader.probe import LoaderProbe
from raymix.mixers import GRADIENT_STATISTICS, DomainStats, Mixer
from raymix.recipe import Recipe


class Feedback:
    """Sums of losses by domain, and the statistics of windows made of them.

    Args of the constructor:
        recipe: The run.
        mixer: Its mixer.
        domains: Names of the domains.
        ranks: The data-parallel ranks.

    Attributes:
        probe: Measures gradient statistics; None until there is one.
    """

    def __init__(
        self, recipe: Recipe, mixer: Mixer, domains: Sequence[str], ranks: Collectives
    ) -> None:
        self.probe: LoaderProbe | None = None
        self._recipe = recipe
        self._mixer = mixer
        self._domains = tuple(domains)
        self._ranks = ranks
        self.restart(None)

    def restart(self, state: Mapping[str, Any] | None) -> None:
        """Begin anew, or in the middle of the window of a state."""
        self._sums = LossSums(len(self._domains))
        self._window = WindowSums(len(self._domains))
        # Since `domain_losses` was called last.
        self._recent = WindowSums(len(self._domains))
        if state is not None:
            self._window.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the window so far, in JSON types."""
        return self._window.state_dict()

    def add(self, token_loss: torch.Tensor, labels: torch.Tensor, domain_ids: torch.Tensor) -> None:
        """Add the losses of a part of a step; see `LossSums.add`."""
        self._sums.add(token_loss, labels, domain_ids)

    def set_held_out(self, losses: Mapping[str, float]) -> None:
        """Set held-out losses by domain, nats per token.

        Raises:
            TrainingError: If a name is not a domain.
        """
        for name, loss in losses.items():
            if name not in self._domains:
                raise TrainingError.at(
                    "losses", name, "not a domain", allowed=f"Domains: {', '.join(self._domains)}"
                )
            self._window.valid_D[self._domains.index(name)] = loss

    def domain_losses(self) -> dict[str, float]:
        """Return the mean loss by domain since the last call, nats per token."""
        loss_D, self._recent = self._recent.losses(), WindowSums(len(self._domains))
        return {self._domains[d]: float(loss_D[d]) for d in np.flatnonzero(loss_D == loss_D)}

    def end_step(self, trained: int) -> DomainStats | None:
        """End a step; return this rank's statistics where a window ends with it.

        A collective of all ranks under a mixer that needs statistics.

        Args:
            trained: Steps trained, this one included.

        Raises:
            RecipeError: If the mixer needs gradient statistics and there is no probe.
        """
        sums_2D = self._sums.take(self._ranks.device)
        if not self._mixer.needs:
            self._recent.add(sums_2D)
            return None
        self._ranks.sum(sums_2D)
        self._recent.add(sums_2D)
        self._window.add(sums_2D)
        interval = self._recipe.train.probe_interval
        return None if trained % interval else self._statistics(trained - interval, interval)

    def _statistics(self, first_step: int, interval: int) -> DomainStats:
        window, needs_probe = self._window, bool(GRADIENT_STATISTICS & self._mixer.needs)
        if not window.labels_D.any():
            raise TrainingError.at(
                "feedback",
                None,
                f"no losses were given for steps {first_step} to {first_step + interval - 1}",
                fix="Call loader.feedback(token_loss, labels, domain_ids) for every part",
            )
        if needs_probe and self.probe is None:
            raise RecipeError.at(
                "mixer.kind",
                self._recipe.mixer.kind,
                "the mixer needs gradient statistics, which nobody measures",
                fix="Call loader.gradient_probe(model) before the first window ends",
            )
        # The sums are of all ranks already: rank 0 sends them, the others send zeros.
        own = self._ranks.rank == 0
        labels_D = window.labels_D if own else np.zeros_like(window.labels_D)
        measured = self.probe.measure(first_step // interval) if self.probe else {}
        stats = DomainStats(
            step=first_step,
            window=interval,
            tokens_D=labels_D.astype(np.int64),
            loss_D=window.losses() if own else np.full(labels_D.shape, np.nan),
            valid_loss_D=window.valid_D.copy(),
            **measured,
        )
        window.restart()
        return stats
