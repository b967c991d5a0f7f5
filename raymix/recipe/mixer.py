"""Recipe models of the mixers, one per `kind`; all weights are shares of tokens."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raymix.recipe._base import Fault, Model, Real, Whole, raise_if

Weights = dict[str, Annotated[Real, Field(ge=0)]]
SUM_TOLERANCE = 1e-6


def _sum_fault(field: str, weights: dict[str, float]) -> Fault | None:
    total = math.fsum(weights.values())
    if abs(total - 1) <= SUM_TOLERANCE:
        return None
    wrong = f"the shares sum to {total:.9g}, not 1"
    advice = f"Divide each by {total:.9g}" if total > 0 else "Give at least one domain a share"
    return Fault(field, weights, wrong, (f"A sum within {SUM_TOLERANCE:g} of 1 is allowed", advice))


class StaticMixer(Model):
    """Fixed shares of tokens."""

    kind: Literal["static"]
    """Selects this mixer."""
    weights: Weights
    """Share per domain, summing to 1; a domain left out gets 0."""

    @model_validator(mode="after")
    def _rules(self) -> StaticMixer:
        raise_if(_sum_fault("weights", self.weights))
        return self


class UniformMixer(Model):
    """The same share for every domain."""

    kind: Literal["uniform"]
    """Selects this mixer."""


class ProportionalMixer(Model):
    """Shares in proportion to the tokens each domain holds."""

    kind: Literal["proportional"] = "proportional"
    """Selects this mixer."""


class TemperatureMixer(Model):
    """Shares in proportion to tokens ** (1 / temperature)."""

    kind: Literal["temperature"]
    """Selects this mixer."""
    temperature: Real = Field(default=3.3, gt=0)
    """1 is proportional, the larger the more uniform; mT5 used 3.3."""


class UnimaxMixer(Model):
    """As uniform as a cap on epochs per domain allows (UniMax, Chung et al. 2023)."""

    kind: Literal["unimax"]
    """Selects this mixer."""
    max_epochs: Real = Field(default=4.0, gt=0)
    """No domain is planned to be read more often than this over the whole run."""


class SchedulePiece(Model):
    """Weights from one step on."""

    step: Whole = Field(ge=0)
    """First step at which the weights hold."""
    weights: Weights
    """Share per domain, summing to 1; a domain left out gets 0."""

    @model_validator(mode="after")
    def _rules(self) -> SchedulePiece:
        raise_if(_sum_fault("weights", self.weights))
        return self


class ScheduleMixer(Model):
    """Shares that change at given steps."""

    kind: Literal["schedule"]
    """Selects this mixer."""
    pieces: tuple[SchedulePiece, ...] = Field(min_length=1)
    """The pieces in order of step; the first starts at 0."""
    interpolate: Literal["hold", "linear"] = "hold"
    """`hold` jumps at each piece; `linear` moves in a straight line, updated every window."""

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
        if steps[0] != 0:
            first = Fault("pieces.0.step", steps[0], "the first piece must start at step 0")
            faults.insert(0, first)
        raise_if(*faults)
        return self


class ReplayMixer(Model):
    """The weights of an earlier run, read from its mixture log."""

    kind: Literal["replay"]
    """Selects this mixer."""
    log: str = Field(min_length=1)
    """Path of a `mixture_log.jsonl`, relative to the working directory."""


MixerConfig = Annotated[
    StaticMixer
    | UniformMixer
    | ProportionalMixer
    | TemperatureMixer
    | UnimaxMixer
    | ScheduleMixer
    | ReplayMixer,
    Field(discriminator="kind"),
]
