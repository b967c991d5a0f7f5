"""What a piece of work costs a rank: seconds of attention, of the linear layers, of communication.

A rank's micro-step, forward and backward, all layers, takes

    max(gather, local attention) + sharded attention + linear layers                       (1)

since the keys and values of sharded sequences travel while the local ones are computed (Skrull,
arXiv 2505.19609, eq. 2). For a sequence of s tokens on w ranks, each of these spends

    quadratic_s s^2 / w + edge_s s + piece_s                                               (2)

on its attention: causal and balanced over the ranks. `edge_s` = quadratic_s h is the loss of a
kernel that reaches half its speed at h query tokens: s^2 / w (1 + h / (s / w)). FlexSP fits the
form a s^2 + b s + c to within 6 %. The linear layers take max(floor_s, base_s + linear_s t) for
the t > 0 tokens on the rank: what is launched whatever the size, and a loss of the same kind. The
gather takes latency_s + token_s v for the v tokens sharded over one team.

Legend: K sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymix.errors import ScheduleError
from raymix.schedule.layout import Floats, Ints

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Link:
    """What gathering keys and values over a team costs, forward and backward, all layers."""

    width: int
    """Ranks in the team: the line holds for teams up to this size."""
    latency_s: float
    """Seconds whatever the size."""
    token_s: float
    """Seconds per token sharded over the team."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds and memory of a model on a device; see the text of the module for the formulas.

    Raises:
        ScheduleError: If a figure is negative, or memory or links are missing.
    """

    quadratic_s: float
    """Seconds per token^2 of attention."""
    edge_s: float = 0.0
    """Seconds per token of attention on every rank of a team: short shards run slower."""
    piece_s: float = 0.0
    """Seconds per sequence on every rank of a team."""
    linear_s: float
    """Seconds per token of everything that is not attention."""
    base_s: float = 0.0
    """Seconds of the linear layers at zero tokens, by extrapolation."""
    floor_s: float = 0.0
    """Least seconds of the linear layers in a micro-step that has tokens."""
    links: tuple[Link, ...] = ()
    """The communication table, one line per size of team, rising; empty: it costs nothing."""
    memory_tokens: int
    """Tokens one rank can hold in a micro-step: Skrull's BucketSize C."""
    hardware: str = ""
    """What it was measured on."""
    date: str = ""
    """When, as YYYY-MM-DD."""
    errors: Mapping[str, float] | None = None
    """Mean relative error of the fit by kind of measurement, where it was fitted."""

    def __post_init__(self) -> None:
        """Check the figures."""
        for name in ("quadratic_s", "edge_s", "piece_s", "linear_s", "base_s", "floor_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ScheduleError.at(f"cost.{name}", value, "not a finite number >= 0")
        if self.memory_tokens < 1:
            raise ScheduleError.at(
                "cost.memory_tokens", self.memory_tokens, "a rank must hold at least one token"
            )
        widths = [link.width for link in self.links]
        if widths != sorted(set(widths)):
            raise ScheduleError.at("cost.links", widths, "the sizes of team do not rise")
        for link in self.links:
            if not (link.width > 1 and 0 <= link.latency_s < np.inf and 0 <= link.token_s < np.inf):
                raise ScheduleError.at(
                    "cost.links", link, "a team of one, or a time that is no finite number >= 0"
                )

    def attention(self, length_K: ArrayLike, width: int | Ints = 1) -> Floats:
        """Return seconds of attention on each of `width` ranks, eq. (2), shape (K,)."""
        length = np.asarray(length_K, dtype=np.float64)
        seconds = self.quadratic_s * length * length / width + self.edge_s * length + self.piece_s
        return np.where(length > 0, seconds, 0.0)

    def linear(self, tokens: ArrayLike) -> Floats:
        """Return seconds of the linear layers for `tokens` on a rank, in the shape given."""
        tokens = np.asarray(tokens, dtype=np.float64)
        return np.maximum(self.floor_s, self.base_s + self.linear_s * tokens) * (tokens > 0)

    def link(self, width: int) -> Link:
        """Return the line of the table for a team of `width`; the widest for wider ones."""
        if width == 1 or not self.links:
            return Link(width, 0.0, 0.0)
        at = bisect_left([link.width for link in self.links], width)
        return self.links[min(at, len(self.links) - 1)]

    def gather(self, tokens: ArrayLike, width_K: ArrayLike) -> Floats:
        """Return seconds to gather `tokens` over teams of `width_K` ranks, shape (K,)."""
        found = np.unique(np.asarray(width_K))
        links = [self.link(int(width)) for width in found]
        at = np.searchsorted(found, width_K)
        latency = np.array([link.latency_s for link in links])[at]
        return latency + np.array([link.token_s for link in links])[at] * np.asarray(tokens)

    def work(self, length_K: ArrayLike, width_K: int | Ints = 1) -> Floats:
        """Return rank-seconds of sequences on teams of a width, without what a micro-step costs."""
        held = self.linear_s * shards(length_K, width_K)
        return width_K * (self.attention(length_K, width_K) + held)

    def narrowest(self, length_K: ArrayLike, widths: tuple[int, ...]) -> Ints:
        """Return the smallest of the rising `widths` that can hold each sequence, shape (K,)."""
        width_W = np.array(widths, dtype=np.int64)
        held_KW = shards(np.asarray(length_K)[:, None], width_W) <= self.memory_tokens
        return width_W[held_KW.argmax(axis=1)]

    def document(self) -> dict[str, Any]:
        """Return the model in JSON types."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> CostModel:
        """Return the model that `document()` described.

        Raises:
            ScheduleError: If it is of another format, or keys are unknown or missing.
        """
        if document.get("format") != FORMAT:
            found = document.get("format")
            raise ScheduleError.at(
                "cost.format",
                found,
                f"this raymix reads cost models of format {FORMAT}",
                fix="Measure again",
            )
        given = {key: value for key, value in document.items() if key != "format"}
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ScheduleError.at(
                "cost", unknown, "unknown keys", allowed=f"Known: {', '.join(sorted(known))}"
            )
        try:
            links = tuple(Link(**link) for link in given.pop("links", ()))
            return cls(**given, links=links)
        except TypeError as error:
            raise ScheduleError.at("cost", sorted(given), f"incomplete: {error}") from error


def shards(length_K: ArrayLike, width: int | Ints) -> Ints:
    """Return the tokens a rank holds of sequences on `width` ranks: shards are padded alike."""
    return -(-np.asarray(length_K, dtype=np.int64) // width)
