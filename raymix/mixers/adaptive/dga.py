"""DGA: shares follow the alignment of each domain's gradient with that of a target set.

Fan, Grangier and Ablin 2024 (arXiv 2410.02498). The update is log w += eta a with a PLUS: the
paper's Algorithm 1 prints a minus, against its own derivation and its authors' later code. Only
what is sampled by is averaged over time; the weights themselves are not. Several targets: the
mean of their gradients, or task weights as in GRAPE (arXiv 2505.20380). Axes: A mixed domains or
basis histograms; T targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raymix.errors import RecipeError
from raymix.mixers.adaptive.bases import read_bases
from raymix.mixers.adaptive.guardrails import Adaptive
from raymix.mixers.adaptive.rule import MixedDomains, Rule, required
from raymix.mixers.adaptive.simplex import Floats, log_normalized
from raymix.mixers.base import DomainStats, Mixer, MixerContext, mixer
from raymix.recipe.adaptive import DgaMixer


class Dga(Rule):
    """The exponents of DGA, and the task weights of GRAPE."""

    def __init__(self, config: DgaMixer, domains: MixedDomains, *, groups: int) -> None:
        self._config = config
        self._domains = domains
        self._groups = groups
        n_targets = domains.target_T.size
        # Histograms are measured against the mean of the targets only: one column.
        self._single = n_targets == 1 or groups > 0
        self._tasks = config.several == "grape" and not self._single
        self._log_task_T = np.full(1 if self._single else n_targets, -np.log(n_targets))
        if self._single:
            self._log_task_T = np.zeros(1)
        self.needs = frozenset(self._needs())
        subject = f"{groups} histograms" if groups else "domains"
        self.summary = (
            f"{subject} by alignment with {n_targets} target{'s' * (n_targets > 1)}: one probe per "
            "window with the target's rows in it, no extra backward"
        )

    def measure(self, stats: DomainStats) -> dict[str, Floats]:
        """Return inner products with the targets (A, T), squared norms, losses of the targets."""
        mixed, targets = self._domains.mixed_M, self._domains.target_T
        if self._groups:
            align_AT = required(stats.group_alignment_N)[:, None]
        elif self._single:
            align_AT = required(stats.alignment_D)[mixed][:, None]
        else:
            align_AT = required(stats.gram_DD)[np.ix_(mixed, targets)]
        measured = {"align": align_AT}
        if self._config.gradients != "raw":
            measured["norm2"] = self._norms2(stats)
            measured["target_norm2"] = self._target_norms2(stats)
        if self._tasks:
            measured["target_loss"] = stats.loss_D[targets]
        return measured

    def propose(self, log_A: Floats, means: Mapping[str, Floats], stats: DomainStats) -> Floats:
        """Return log weights after one step up the targets' gradients, shape (A,)."""
        align_AT = self._bounded(means)
        task_T = np.exp(self._log_task_T)
        if self._tasks:
            # The gradient of the log loss, so that no task counts for more by the size of its loss.
            align_AT = align_AT / np.maximum(means["target_loss"], 1e-6)
            # A task that the present mixture serves well counts for less from now on.
            helped_T = np.exp(log_A) @ align_AT
            self._log_task_T = log_normalized(self._log_task_T - self._config.task_step * helped_T)
        return log_A + self._config.eta * (align_AT @ task_T)

    def state_dict(self) -> dict[str, Any]:
        """Return the task weights."""
        return {"log_task": self._log_task_T.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._log_task_T = np.array(state["log_task"], np.float64)

    def _needs(self) -> set[str]:
        normed = self._config.gradients != "raw"
        if self._groups:
            needs = {"group_alignment"} | ({"group_gram"} if normed else set())
        elif self._single:
            needs = {"alignment"} | ({"grad_norm2"} if normed else set())
        else:
            needs = {"gram"}
        # The norm of the mean of several targets takes their inner products.
        if self._single and normed:
            needs |= {"gram" if self._domains.target_T.size > 1 else "grad_norm2"}
        return needs | ({"loss"} if self._tasks else set())

    def _norms2(self, stats: DomainStats) -> Floats:
        if self._groups:
            return np.diagonal(required(stats.group_gram_NN)).copy()
        if self._single:
            return required(stats.grad_norm2_D)[self._domains.mixed_M]
        return np.diagonal(required(stats.gram_DD))[self._domains.mixed_M]

    def _target_norms2(self, stats: DomainStats) -> Floats:
        targets = self._domains.target_T
        if targets.size == 1:
            norm2 = stats.grad_norm2_D if self._single else np.diagonal(required(stats.gram_DD))
            return required(norm2)[targets]
        gram_TT = required(stats.gram_DD)[np.ix_(targets, targets)]
        return np.array([gram_TT.mean()]) if self._single else np.diagonal(gram_TT).copy()

    def _bounded(self, means: Mapping[str, Floats]) -> Floats:
        """Return the inner products of gradients of norm 1, or at most 1, shape (A, T).

        Norms are estimates: what is not above 0 has no direction yet, and counts as no alignment.
        """
        align_AT = means["align"]
        if self._config.gradients == "raw":
            return align_AT
        norm_AT = np.sqrt(
            np.maximum(means["norm2"], 0)[:, None] * np.maximum(means["target_norm2"], 0)
        )
        if self._config.gradients == "clip":
            # Gradients of norm up to 1 stay as they are, longer ones are scaled to 1.
            parts = np.maximum(means["norm2"], 1)[:, None] * np.maximum(means["target_norm2"], 1)
            return np.clip(align_AT / np.sqrt(parts), -1, 1)
        unit_AT = np.divide(align_AT, norm_AT, out=np.zeros(align_AT.shape), where=norm_AT > 0)
        # Norms and products have noise of their own, so a cosine can leave [-1, 1].
        return np.clip(unit_AT, -1, 1)


@mixer("dga")
def _dga(config: DgaMixer, context: MixerContext) -> Mixer:
    if not context.targets:
        wrong, advice = "dga needs a target", "Name a domain to hold out of the mixture"
        raise RecipeError.at("mixer.targets", (), wrong, fix=advice)
    groups_ND: Floats | None = None
    if config.bases is not None:
        groups_ND = read_bases(config.bases, context, uniform=config.uniform_basis)
    rule = Dga(config, MixedDomains.of(context), groups=0 if groups_ND is None else len(groups_ND))
    return Adaptive(rule, config, context, groups_ND=groups_ND, ema=config.ema)
