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
from raymix.recipe.shares import MixerModel, Name, Names, Weights, sum_fault


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


class EpochsMixer(MixerModel):
    """Shares in proportion to epochs x tokens: how often each domain is read, against the others.

    The length of the run decides how often that is in all; `plan` says which `train.tokens` gives
    the epochs as written.
    """

    kind: Literal["epochs"]
    """Selects this mixer."""
    epochs: Weights = Field(min_length=1)
    """Passes over each domain's tokens; a domain left out is not read."""

    @model_validator(mode="after")
    def _rules(self) -> EpochsMixer:
        advice = ("Give at least one domain an epoch, or a part of one",)
        nothing = Fault("epochs", dict(self.epochs), "nothing would be read", advice)
        raise_if(None if any(self.epochs.values()) else nothing)
        return self

    def values(self) -> dict[str, Mapping[str, float]]:
        """Return the epochs by domain."""
        return {"epochs": self.epochs}


class InheritMixer(MixerModel):
    """The shares of a run so far, for `raymix train --domains-from`: its domains change.

    Domains that stay keep their proportions. The share of a domain that goes is shared out to the
    others in proportion, or among the domains that `split` names.
    """

    kind: Literal["inherit"]
    """Selects this mixer."""
    added: Weights = Field(default_factory=dict)
    """Share of each domain that is new; those that stay divide the rest."""
    split: dict[Name, Names] = Field(default_factory=dict)
    """New domains by the domain whose share they take, divided by their tokens."""

    @model_validator(mode="after")
    def _rules(self) -> InheritMixer:
        total = sum(self.added.values())
        parts = [name for names in self.split.values() for name in names]
        twice = sorted({name for name in parts if parts.count(name) > 1 or name in self.added})
        raise_if(
            Fault("added", dict(self.added), f"the shares sum to {total:.6g}", ("below 1",))
            if total >= 1
            else None,
            Fault("split", self.split, f"{twice[0]} would have two shares", ()) if twice else None,
        )
        return self

    def values(self) -> dict[str, Mapping[str, float]]:
        """Return the shares of new domains, and the names of parts."""
        parts = {name: 0.0 for names in self.split.values() for name in names}
        return {"added": self.added, "split": parts}


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
    | EpochsMixer
    | UnimaxMixer
    | ImportanceMixer
    | ScheduleMixer
    | ReplayMixer
    | InheritMixer
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
    {"static", "uniform", "proportional", "temperature", "epochs", "unimax", "importance"}
    | {"schedule", "replay", "inherit"}
    | {"pike", "dga", "doge", "doremi", "odm", "ado", "rb", "aioli"}
)
MixerConfig = Annotated[
    _Own, Field(discriminator="kind"), OpenUnion(MIXERS, model=PluginMixer, own=OWN_KINDS)
]
