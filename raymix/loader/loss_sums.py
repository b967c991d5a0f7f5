"""Losses by domain: summed over the tokens of steps, and the statistics of a window from them.

Axes: D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from raymix.errors import TrainingError
from raymix.training.model.loss import IGNORED

Floats = npt.NDArray[np.float64]


class LossSums:
    """Sums of one rank's losses by domain, on the device of the losses, without a wait for it.

    Args of the constructor:
        n_domains: D.
    """

    def __init__(self, n_domains: int) -> None:
        self._n_domains = n_domains
        self._sums_2D: torch.Tensor | None = None

    def add(self, token_loss: torch.Tensor, labels: torch.Tensor, domain_ids: torch.Tensor) -> None:
        """Add the losses of a part.

        Args:
            token_loss: Loss of every token, nats; it counts where `labels` is not -100.
            labels: Labels of the same shape, unshifted or shifted as the losses are.
            domain_ids: Domain of each token, of the same shape; below 0: of none.

        Raises:
            TrainingError: If the shapes differ.
        """
        if not token_loss.shape == labels.shape == domain_ids.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in (token_loss, labels, domain_ids))
            raise TrainingError.at(
                "token_loss",
                None,
                f"losses, labels and domains have the shapes {shapes}",
                fix="Give them one shape; raymix.token_losses(logits, labels) makes such losses",
            )
        loss, known = token_loss.detach().double(), (labels != IGNORED) & (domain_ids >= 0)
        both_2N = torch.stack([torch.where(known, loss, 0.0), known.double()]).flatten(1)
        if self._sums_2D is None:
            self._sums_2D = both_2N.new_zeros(2, self._n_domains)
        index = domain_ids.clamp(min=0).flatten().to(both_2N.device)
        self._sums_2D.index_add_(1, index, both_2N)

    def take(self, device: torch.device) -> torch.Tensor:
        """Return nats and labels by domain since the last call, (2, D), and start from zero."""
        sums, self._sums_2D = self._sums_2D, None
        if sums is None:
            return torch.zeros(2, self._n_domains, dtype=torch.float64, device=device)
        return sums.to(device)


class WindowSums:
    """Sums over all ranks since the window began, and the newest held-out losses."""

    def __init__(self, n_domains: int) -> None:
        self.nats_D: Floats = np.zeros(n_domains)
        self.labels_D: Floats = np.zeros(n_domains)
        self.valid_D: Floats = np.full(n_domains, np.nan)

    def add(self, sums_2D: torch.Tensor) -> None:
        """Add the sums of a step."""
        nats_D, labels_D = sums_2D.cpu().numpy()
        self.nats_D += nats_D
        self.labels_D += labels_D

    def losses(self) -> Floats:
        """Return the mean loss by domain, nats per token, shape (D,); NaN without tokens."""
        loss_D = np.full(self.nats_D.shape, np.nan)
        return np.divide(self.nats_D, self.labels_D, out=loss_D, where=self.labels_D > 0)

    def restart(self) -> None:
        """Begin a window: sums are zero, held-out losses stay."""
        self.nats_D[:], self.labels_D[:] = 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums in JSON types; NaN is None."""
        fields = {"nats": self.nats_D, "labels": self.labels_D, "valid": self.valid_D}
        return {
            name: [None if np.isnan(value) else value for value in values.tolist()]
            for name, values in fields.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.nats_D, self.labels_D, self.valid_D = (
            np.array(state[name], dtype=np.float64) for name in ("nats", "labels", "valid")
        )


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token, nats, of the shape of `labels`; 0 where there is no label.

    Args:
        logits: (B, L, V).
        labels: Unshifted, (B, L), as a `MixtureLoader` gives them.
    """
    # Labels are shifted and not the logits, of which `logits[:, :-1]` would be a copy.
    next_BL = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss_N = functional.cross_entropy(
        logits.flatten(0, 1).float(), next_BL.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return functional.pad(loss_N.view(labels.shape)[:, :-1], (1, 0))
