"""Recipe model of `raymix tune`: proxy runs, law, objective, verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raymix.recipe.base import Fault, Integer, Number, RecipeModel, raise_if
from raymix.recipe.shares import Weights, sum_fault

Share = Annotated[Number, Field(ge=0, le=1)]

# A proxy run is a run of one mixture: these fields would make it something else.
_NOT_IN_PROXIES = ("name", "seed", "corpus", "mixer", "run", "cluster", "tune", "specialists")


class TuneConfig(RecipeModel):
    """How `raymix tune` looks for the best shares."""

    mode: Literal["design", "sequential", "optuna"] = "design"
    """`design`: all mixtures beforehand; `sequential`: a part of them, then each by the law's
    expected improvement; `optuna`: each by Optuna's TPE, a baseline that knows no law."""
    runs: Integer = Field(default=16, ge=2, le=10_000)
    """Small runs of the design, or in all where each follows from those before."""
    initial: Integer | None = Field(default=None, ge=2)
    """With `sequential` and `optuna`, runs of the design to begin with; left out, half of all."""
    design: Literal["dirichlet", "space_filling", "d_optimal"] = "dirichlet"
    """`dirichlet`: draws around `prior`; `space_filling`: evenly over all that is allowed;
    `d_optimal`: what determines the law's coefficients best."""
    prior: Literal["proportional", "uniform"] | Weights = "proportional"
    """Shares that `dirichlet` draws around and `kl` keeps near to."""
    concentration: Number = Field(default=1.0, gt=0)
    """Of `dirichlet`: parameters concentration x domains x prior; the larger, the nearer to it."""
    vertices: bool = False
    """Add a run per domain with as much as may be of it."""
    leave_one_out: bool = False
    """Add a run per domain with the prior less that domain."""
    seed: Integer = Field(default=0, ge=0, lt=2**31)
    """Seeds the design; the runs themselves are seeded by the recipe."""
    law: str = Field(default="auto", min_length=1)
    """Kind of law to fit; `auto` chooses by cross-validation."""
    weights: Weights = Field(default_factory=dict)
    """Weight of each domain's loss in what is minimized; left out, mixer.targets alike or, where
    there are none, all domains alike."""
    minimax: bool = False
    """Minimize the largest weighted loss instead of the sum."""
    horizon: Integer | None = Field(default=None, ge=1)
    """Steps of a run that the optimum is for; left out, those of the small runs."""
    floor: Number = Field(default=0.1, ge=0, lt=1)
    """Every domain has at least floor / K of K domains; many laws know no share of 0."""
    floors: dict[str, Share] = Field(default_factory=dict)
    """Least share by domain, in place of floor / K."""
    caps: dict[str, Share] = Field(default_factory=dict)
    """Largest share by domain."""
    max_epochs: Number | None = Field(default=None, gt=0)
    """No share may need more passes over a domain in the recipe's own run, not the small ones; left
    out, as data.max_epochs says."""
    extrapolate: bool = False
    """Let the optimum give a domain more than any small run did: laws are often wrong there."""
    kl: Number = Field(default=0.0, ge=0)
    """Weight of KL(shares || prior), in nats, in what is minimized."""
    verify: Integer = Field(default=3, ge=0, le=100)
    """Seeds, new ones, to run the optimum and what it is compared with on; 0 for none."""
    scheduler: Literal["none", "asha"] = "none"
    """With mode `design`, `asha` stops runs of high loss early (ASHA); their last losses are used
    all the same."""
    proxy: dict[str, Any] = Field(default_factory=dict)
    """Fields of the recipe that differ in the small runs, e.g. {train.steps: 120}."""

    @model_validator(mode="after")
    def _rules(self) -> TuneConfig:
        raise_if(
            sum_fault("prior", self.prior) if isinstance(self.prior, dict) else None,
            self._initial_fault(),
            self._weights_fault(),
            self._scheduler_fault(),
            *self._proxy_faults(),
        )
        return self

    def _initial_fault(self) -> Fault | None:
        if self.initial is None or self.initial <= self.runs:
            return None
        wrong = f"more than the {self.runs} runs there are in all"
        return Fault("initial", self.initial, wrong, ("Lower it, or raise runs",))

    def _weights_fault(self) -> Fault | None:
        if not self.weights or any(self.weights.values()):
            return None
        return Fault("weights", self.weights, "every weight is 0", ("Weigh at least one loss",))

    def _scheduler_fault(self) -> Fault | None:
        if self.scheduler == "none" or self.mode == "design":
            return None
        wrong = f"runs that follow from those before, as with mode {self.mode}, are all run out"
        return Fault("scheduler", self.scheduler, wrong, ("Use it with mode: design",))

    def _proxy_faults(self) -> list[Fault]:
        advice = "A small run is one mixture; allowed are data, model, train, eval"
        return [
            Fault(f"proxy.{key}", value, "cannot differ in the small runs", (advice,))
            for key, value in self.proxy.items()
            if key.split(".")[0] in _NOT_IN_PROXIES
        ]

    def by_domain(self) -> dict[str, Mapping[str, float]]:
        """Return the mappings of domains to numbers, by field."""
        values: dict[str, Mapping[str, float]] = {
            "weights": self.weights,
            "floors": self.floors,
            "caps": self.caps,
        }
        return values | ({"prior": self.prior} if isinstance(self.prior, dict) else {})
