"""Recipe models of the mixers, one per `kind`; all weights are shares of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raymix.recipe._base import Model

Weights = dict[str, Annotated[float, Field(ge=0)]]


class StaticMixer(Model):
    """Fixed shares of tokens."""

    kind: Literal["static"]
    """Selects this mixer."""
    weights: Weights
    """Share per domain, summing to 1; a domain left out gets 0."""


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
    temperature: float = Field(default=3.3, gt=0)
    """1 is proportional, infinity is uniform; mT5 used 3.3."""


class UnimaxMixer(Model):
    """As uniform as a cap on epochs per domain allows (UniMax, Chung et al. 2023)."""

    kind: Literal["unimax"]
    """Selects this mixer."""
    max_epochs: float = Field(default=4.0, gt=0)
    """No domain is planned to be read more often than this over the whole run."""


class SchedulePiece(Model):
    """Weights from one step on."""

    step: int = Field(ge=0)
    """First step at which the weights hold."""
    weights: Weights
    """Share per domain, summing to 1; a domain left out gets 0."""


class ScheduleMixer(Model):
    """Shares that change at given steps."""

    kind: Literal["schedule"]
    """Selects this mixer."""
    pieces: tuple[SchedulePiece, ...] = Field(min_length=1)
    """The pieces in order of step; the first starts at 0."""
    interpolate: Literal["hold", "linear"] = "hold"
    """`hold` jumps at each piece; `linear` moves in a straight line, updated every window."""


class ReplayMixer(Model):
    """The weights of an earlier run, read from its mixture log."""

    kind: Literal["replay"]
    """Selects this mixer."""
    log: str
    """Path of a `mixture_log.jsonl`."""


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
