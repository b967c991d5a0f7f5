"""Recipe models of the mixers that learn from the run, one per `kind`.

All share the guardrails of `AdaptiveModel`. "Update" means once per window, that is every
`train.probe_interval` steps; papers that update every step say so at the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raymix.recipe.base import Fault, Integer, Number, raise_if
from raymix.recipe.shares import MixerModel, Weights, sum_fault

Losses = dict[str, Annotated[Number, Field(ge=0)]]
LossKind = Literal["train", "valid"]


class AdaptiveModel(MixerModel):
    """The guardrails of every mixer that learns from the run."""

    initial: Literal["uniform", "proportional"] | Weights = "uniform"
    """Shares to begin with; a mapping sums to 1, a domain left out begins at 0."""
    floor: Number = Field(default=0.02, ge=0, lt=1)
    """Part c of (1 - c) w + c / K: c / K is the least share; mixed in at every update."""
    max_log_change: Number | None = Field(default=0.5, gt=0)
    """Most change of a domain's log share per update, in nats; null for no cap."""
    warmup_steps: Integer = Field(default=0, ge=0)
    """Steps whose statistics are gathered while the initial shares hold."""
    stats_ema: Number = Field(default=0.5, gt=0, le=1)
    """Weight of the newest window in the bias-corrected mean of each statistic; 1 is no mean."""
    paper_exact: bool = False
    """The update as printed: no floor, cap, warm-up or mean of statistics, no unit-free scaling."""

    @model_validator(mode="after")
    def _initial_sums_to_one(self) -> AdaptiveModel:
        raise_if(sum_fault("initial", self.initial) if isinstance(self.initial, dict) else None)
        return self

    def shares(self) -> dict[str, Mapping[str, float]]:
        """Return the initial shares, where they are given by name."""
        return {"initial": self.initial} if isinstance(self.initial, dict) else {}


class PikeMixer(AdaptiveModel):
    """Shares follow gradient norms against gradient noise (PiKE; Balanced-PiKE with tau > 0)."""

    kind: Literal["pike"]
    """Selects this mixer."""
    form: Literal["simplified", "full", "exact_qp"] = "simplified"
    """`simplified` is Algorithm 1; `full` keeps the dropped curvature term, so it settles inside
    the simplex; `exact_qp` solves problem (9) at every update."""
    zeta_1: Number = Field(default=0.1, ge=0)
    """Gain of the squared gradient norm; in 1 / norm squared where not unit-free."""
    zeta_2: Number = Field(default=0.05, ge=0)
    """Gain of the gradient noise, and of the curvature term; units as zeta_1."""
    unit_free: bool = True
    """Divide norms and noise by the mean over domains of norm squared + noise / batch."""
    tau: Number = Field(default=0.0, ge=0)
    """Tilt toward domains of high loss, in 1 / nats; 0 is PiKE exactly, the paper liked 1 to 5."""
    loss_weights: bool = True
    """With tau > 0, also weigh each domain's loss by K softmax(tau loss)."""
    loss: LossKind = "train"
    """Which loss tau looks at."""
    lr: Number | None = Field(default=None, gt=0)
    """Step size eta of the bound (8); with smoothness, zeta_2 is zeta_1 L eta / beta instead."""
    smoothness: Number | None = Field(default=None, gt=0)
    """Lipschitz constant L of the gradients, in 1 / units of lr: L x lr has no unit."""
    beta: Number = Field(default=1.0, gt=0, le=1)
    """Conflict factor of (8), dimensionless; 1 where gradients do not conflict."""
    gamma: Number = Field(default=1.0, ge=1)
    """Alignment factor of (8), dimensionless; 1 where gradients are not aligned."""

    @model_validator(mode="after")
    def _constants(self) -> PikeMixer:
        given = self.lr if self.smoothness is None else self.smoothness
        # Only their product with the other constants has a meaning; one alone would be ignored.
        alone = (self.lr is None) != (self.smoothness is None)
        name = "lr" if self.smoothness is None else "smoothness"
        wrong = "lr and smoothness go together"
        advice = "Give both, or neither and set zeta_2"
        raise_if(Fault(name, given, wrong, (advice,)) if alone else None)
        return self


class DgaMixer(AdaptiveModel):
    """Shares follow the gradients' alignment with a target set's (DGA; GRAPE for several)."""

    kind: Literal["dga"]
    """Selects this mixer."""
    eta: Number = Field(default=1.0, ge=0)
    """Outer step: log weights change by + eta x alignment; the unit goes with `gradients`."""
    gradients: Literal["unit", "clip", "raw"] = "unit"
    """Norm of the gradients in the inner product: 1, at most 1 (as GRAPE, whose eta is 1.5), or as
    it is (as the paper)."""
    ema: Number = Field(default=0.35, gt=0, le=1)
    """Weight of the newest weights in the sampled average; the weights themselves are not
    averaged; 1 is no average."""
    several: Literal["mean", "grape"] = "mean"
    """Several targets: the mean of their gradients, or GRAPE's task weights over log losses."""
    task_step: Number = Field(default=10.0, ge=0)
    """GRAPE's step of the task weights, as eta: log weights fall by it x what the batch helps."""
    bases: str | dict[str, Weights] | None = None
    """Histograms over domains to mix in place of the domains: a .json, .npz or .csv file,
    or a mapping of names to shares by domain; each is scaled to 1."""
    uniform_basis: bool = True
    """Add the uniform histogram to the bases, so that every domain stays in reach."""

    @model_validator(mode="after")
    def _has_a_target(self) -> DgaMixer:
        advice = "Name a domain that is to be held out of the mixture, e.g. targets: [medicine]"
        no_target = Fault("targets", list(self.targets), "dga needs a target", (advice,))
        mixed = self.bases is not None and self.several == "grape" and len(self.targets) > 1
        wrong = "bases go with the mean of the targets only"
        # With bases the weights are of histograms, so shares by domain cannot be their start.
        by_name = self.bases is not None and isinstance(self.initial, dict)
        raise_if(
            None if self.targets else no_target,
            Fault("several", self.several, wrong, ("Set several: mean",)) if mixed else None,
            Fault("initial", self.initial, "bases begin uniform", ("Leave it out",))
            if by_name or (self.bases is not None and self.initial != "uniform")
            else None,
        )
        return self

    def shares(self) -> dict[str, Mapping[str, float]]:
        """Return the initial shares and the bases that are given by name."""
        inline = self.bases if isinstance(self.bases, dict) else {}
        return {**super().shares(), **{f"bases.{name}": shares for name, shares in inline.items()}}


class DogeMixer(AdaptiveModel):
    """Shares follow the gradients' alignment with all domains', or with the targets' (DoGE)."""

    kind: Literal["doge"]
    """Selects this mixer."""
    step: Number = Field(default=0.5, ge=0)
    """lr / mu: change of a log weight per unit of score; the paper takes 0.05 at every step."""
    clip_norm: Number | None = Field(default=1.0, gt=0)
    """Largest norm of a domain's gradient; null for no clipping."""
    self_term: bool = False
    """Without targets: count a domain's alignment with itself."""


class DoremiMixer(AdaptiveModel):
    """Shares follow how far each domain's loss is above a reference (DoReMi, Sheared-LLaMA)."""

    kind: Literal["doremi"]
    """Selects this mixer."""
    reference: Losses
    """Reference loss of every domain that is trained on, in nats per token."""
    form: Literal["excess", "gap"] = "excess"
    """`excess` counts only losses above the reference (DoReMi), `gap` both ways (Sheared-LLaMA)."""
    step: Number = Field(default=1.0, ge=0)
    """Change of a log weight per nat above the reference."""
    loss: LossKind = "train"
    """Which loss is compared; Sheared-LLaMA takes the held-out one."""
    # The papers' own value, and not the 0.02 of the other mixers.
    floor: Number = Field(default=1e-3, ge=0, lt=1)
    """Part c of (1 - c) w + c / K, the papers' smoothing; mixed in at every update."""

    def values(self) -> dict[str, Mapping[str, float]]:
        """Return the reference losses."""
        return {"reference": self.reference}


class OdmMixer(AdaptiveModel):
    """A bandit whose reward is the training loss (ODM, Exp3)."""

    kind: Literal["odm"]
    """Selects this mixer."""
    form: Literal["exp3", "smoothed_mean"] = "exp3"
    """`exp3` adds up loss / share, weights exponential; `smoothed_mean` averages exp(loss)."""
    reward_scale: Number = Field(default=10.0, gt=0)
    """Nats of loss that count as a reward of 1, in `exp3`."""
    smoothing: Number = Field(default=0.9, ge=0, lt=1)
    """Weight of the old mean reward, in `smoothed_mean`."""
    floor: Number = Field(default=0.0, ge=0, lt=1)
    """Part c of (1 - c) w + c / K; the bandit explores by itself."""
    stats_ema: Number = Field(default=1.0, gt=0, le=1)
    """Weight of the newest window in the bias-corrected mean of the loss; 1 is no mean."""


class AdoMixer(AdaptiveModel):
    """Shares follow how fast fitted power laws say each domain's loss still falls (ADO)."""

    kind: Literal["ado"]
    """Selects this mixer."""
    initial: Literal["uniform", "proportional"] | Weights = "proportional"
    """The prior mu, and the shares to begin with; a mapping sums to 1."""
    fit_every: Integer = Field(default=4, ge=1)
    """Updates between fits."""
    skip_steps: Integer = Field(default=0, ge=0)
    """First steps whose losses are not fitted; the paper skips 500 to 1,000."""
    history_power: Number = Field(default=0.5, ge=0)
    """Exponent of the recent shares in a domain's preference."""
    history_ema: Number = Field(default=0.1, gt=0, le=1)
    """Weight of the newest window in the recent shares."""
    newest: Number = Field(default=0.1, gt=0, le=1)
    """Part of the newest preference in the shares; the rest is its mean over time."""
    least: Number = Field(default=0.01, ge=0, lt=1)
    """Least preference, or half a uniform share where that is less."""
    floor: Number = Field(default=0.0, ge=0, lt=1)
    """Part c of (1 - c) w + c / K; `least` keeps domains alive already."""
    stats_ema: Number = Field(default=1.0, gt=0, le=1)
    """Weight of the newest window in the bias-corrected mean of the loss; 1 is no mean."""


class RbMixer(AdaptiveModel):
    """Shares follow each domain's alignment with an evaluation mixture, memoryless (R&B)."""

    kind: Literal["rb"]
    """Selects this mixer."""
    scale: Number = Field(default=3.0, ge=0)
    """Log weights are scale x alignments / their root of summed squares; dimensionless."""
    eval_shares: Weights | None = None
    """The evaluation mixture, summing to 1; left out, even over the targets, else over all."""

    @model_validator(mode="after")
    def _eval_sums_to_one(self) -> RbMixer:
        raise_if(sum_fault("eval_shares", self.eval_shares) if self.eval_shares else None)
        return self

    def values(self) -> dict[str, Mapping[str, float]]:
        """Return the evaluation mixture: a target may stand in it."""
        return {"eval_shares": self.eval_shares} if self.eval_shares else {}


class AioliMixer(AdaptiveModel):
    """Shares follow how much total loss fell per unit of each domain's share (Aioli-style)."""

    kind: Literal["aioli"]
    """Selects this mixer."""
    eta: Number = Field(default=0.5, ge=0)
    """Log weights are eta x K x the estimated gains, which sum to 1; dimensionless."""
    explore: Number = Field(default=0.2, gt=0, lt=1)
    """Part of a window's shares that goes to one block of domains, in turn, to learn from."""
    blocks: Integer = Field(default=8, ge=2)
    """Most blocks the domains take turns in."""
    ridge: Number = Field(default=0.1, gt=0)
    """Pull of the estimate toward equal gains, as a part of the mean squared share."""
    history: Integer = Field(default=32, ge=4)
    """Most windows to estimate from; fewer with more than 1,000 domains."""
    loss: LossKind = "train"
    """Which loss is to fall."""
    stats_ema: Number = Field(default=1.0, gt=0, le=1)
    """Weight of the newest window in the bias-corrected mean of the loss; 1 is no mean."""
