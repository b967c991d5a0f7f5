"""Recipe models of mixers whose shares are known before the run, and the union of all mixers.

One model per `kind`; all weights are shares of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raymix.recipe.adaptive import (
    AdoMixer,
    AioliMixer,
    DgaMixer,
    DogeMixer,
    DoremiMixer,
    OdmMixer,
    PikeMixer,
    RbMixer,
)
from raymix.recipe.base import Fault, Integer, Number, RecipeModel, raise_if
from raymix.recipe.plugins import MIXERS, OpenUnion, PluginMixer
from raymix.recipe.shares import MixerModel, Weights, sum_fault


class StaticMixer(MixerModel):
    """Fixed shares of tokens."""

    kind: Literal["static"]
    """Selects this mixer."""
    weights: Weights
    """Share per domain, summing to 1; a domain left out gets 0."""
    relative: bool = False
    """Take the weights as ratios, counts or percents: each is divided by their sum."""

    @model_validator(mode="after")
    def _rules(self) -> StaticMixer:
        raise_if(sum_fault("weights", self.weights, relative=self.relative, ratios=True))
        return self

    def shares(self) -> dict[str, Mapping[str, float]]:
        """Return the weights."""
        return {"weights": self.weights}


class UniformMixer(MixerModel):
    """The same share for every domain."""

    kind: Literal["uniform"]
    """Selects this mixer."""


class ProportionalMixer(MixerModel):
    """Shares in proportion to the tokens each domain holds."""

    kind: Literal["proportional"] = "proportional"
    """Selects this mixer."""


class TemperatureMixer(MixerModel):
    """Shares in proportion to tokens ** (1 / temperature)."""

    kind: Literal["temperature"]
    """Selects this mixer."""
    temperature: Number = Field(default=3.3, gt=0)
    """1 is proportional, the larger the more uniform; mT5 used 3.3."""


class UnimaxMixer(MixerModel):
    """As uniform as a cap on epochs per domain allows (UniMax, Chung et al. 2023)."""

    kind: Literal["unimax"]
    """Selects this mixer."""
    max_epochs: Number = Field(default=4.0, gt=0)
    """No domain is planned to be read more often than this over the whole run."""


class ImportanceMixer(MixerModel):
    """Shares as the target's documents are spread over the domains (importance sampling)."""

    kind: Literal["importance"]
    """Selects this mixer."""
    floor: Number = Field(default=0.0, ge=0, lt=1)
    """Part c of (1 - c) w + c / K: what the domains get that no document of the target is near."""

    @model_validator(mode="after")
    def _rules(self) -> ImportanceMixer:
        advice = "Name a domain that is to be held out of the mixture, e.g. targets: [medicine]"
        no_target = Fault("targets", list(self.targets), "importance needs a target", (advice,))
        raise_if(None if self.targets else no_target)
        return self


class SchedulePiece(RecipeModel):
    """Weights from one step on."""

    step: Integer = Field(ge=0)
    """First step at which the weights hold."""
    weights: Weights
    """Share per domain, summing to 1; a domain left out gets 0."""


class ScheduleMixer(MixerModel):
    """Shares that change at given steps."""

    kind: Literal["schedule"]
    """Selects this mixer."""
    pieces: tuple[SchedulePiece, ...] = Field(min_length=1)
    """The pieces in order of step; the first starts at 0."""
    interpolate: Literal["hold", "linear"] = "hold"
    """`hold` jumps at each piece; `linear` moves in a straight line, updated every window."""
    relative: bool = False
    """Take the weights of each piece as ratios: each is divided by their sum."""

    @model_validator(mode="after")
    def _rules(self) -> ScheduleMixer:
        steps = [piece.step for piece in self.pieces]
        faults = [
            Fault(
                f"pieces.{i}.step", step, f"not after the piece before it, at step {steps[i - 1]}"
            )
            for i, step in enumerate(steps)
            if i > 0 and step <= steps[i - 1]
        ]
        sums = (
            sum_fault(f"pieces.{i}.weights", piece.weights, relative=self.relative, ratios=True)
            for i, piece in enumerate(self.pieces)
        )
        faults += [fault for fault in sums if fault is not None]
        # A run needs shares from its first step; a default here would hide a forgotten piece.
        if steps[0] != 0:
            # Put first, since the faults after it may follow from it.
            first = Fault("pieces.0.step", steps[0], "the first piece must start at step 0")
            faults.insert(0, first)
        raise_if(*faults)
        return self

    def shares(self) -> dict[str, Mapping[str, float]]:
        """Return the weights of each piece."""
        return {f"pieces.{i}.weights": piece.weights for i, piece in enumerate(self.pieces)}


class ReplayMixer(MixerModel):
    """The weights of an earlier run, read from its mixture log."""

    kind: Literal["replay"]
    """Selects this mixer."""
    log: str = Field(min_length=1)
    """A `mixture_log.jsonl`, as runs write it."""


_Own = (
    StaticMixer
    | UniformMixer
    | ProportionalMixer
    | TemperatureMixer
    | UnimaxMixer
    | ImportanceMixer
    | ScheduleMixer
    | ReplayMixer
    | PikeMixer
    | DgaMixer
    | DogeMixer
    | DoremiMixer
    | OdmMixer
    | AdoMixer
    | RbMixer
    | AioliMixer
)
# Written out: read from the models, it would be known only after the union is built.
OWN_KINDS = frozenset(
    {"static", "uniform", "proportional", "temperature", "unimax", "importance", "schedule"}
    | {"replay", "pike", "dga", "doge", "doremi", "odm", "ado", "rb", "aioli"}
)
MixerConfig = Annotated[
    _Own, Field(discriminator="kind"), OpenUnion(MIXERS, model=PluginMixer, own=OWN_KINDS)
]
