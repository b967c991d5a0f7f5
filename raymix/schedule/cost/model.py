"""The cost model: seconds of attention, linear layers and communication on a rank, and its memory.

A rank's micro-step, forward and backward, all layers, takes

    max(gather, local attention) + sharded attention + linear layers                       (1)

since the keys and values of sharded sequences travel while local sequences are computed (Skrull,
arXiv 2505.19609, eq. 2). For a sequence of s tokens on w ranks, each rank spends

    quadratic_s s^2 / w + edge_s s + piece_s                                               (2)

on its attention: causal and balanced over the ranks. `edge_s` = quadratic_s h models a kernel that
reaches half its speed at h query tokens: s^2 / w (1 + h / (s / w)). FlexSP fits the form
a s^2 + b s + c to within 6 %. The linear layers take max(floor_s, base_s + linear_s t) for the
t > 0 tokens on the rank: kernel launches that do not depend on size, and the same loss of speed at
few tokens. The gather takes latency_s + token_s v for the v tokens sharded over one CP group.

Legend: K sequences, W widths.
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
"""Version of the JSON form; a file of another version is refused."""


@dataclass(frozen=True, slots=True)
class Link:
    """Cost of gathering keys and values over a CP group, forward and backward, all layers."""

    width: int
    """Ranks in the CP group; the entry holds for groups up to this size."""
    latency_s: float
    """Seconds per collective, independent of its size."""
    token_s: float
    """Seconds per token sharded over the CP group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds and memory of a model on a device; the module docstring has the formulas.

    Raises:
        ScheduleError: If a coefficient is negative or not finite, memory is below one token, or
            the links are not sorted by width.
    """

    quadratic_s: float
    """Seconds per token^2 of attention."""
    edge_s: float = 0.0
    """Seconds per token of attention on every rank of a CP group: short shards run slower."""
    piece_s: float = 0.0
    """Seconds per sequence on every rank of a CP group."""
    linear_s: float
    """Seconds per token of everything that is not attention."""
    base_s: float = 0.0
    """Seconds of the linear layers at zero tokens, by extrapolation."""
    floor_s: float = 0.0
    """Minimum seconds of the linear layers in a micro-step that has tokens."""
    links: tuple[Link, ...] = ()
    """The communication table by rising width of the CP group; empty: communication is free."""
    memory_tokens: int
    """Tokens one rank can hold in a micro-step: Skrull's BucketSize C."""
    hardware: str = ""
    """Device the coefficients were measured on."""
    date: str = ""
    """Date of the measurement, YYYY-MM-DD."""
    errors: Mapping[str, float] | None = None
    """Mean relative error of the fit by kind of measurement, where it was fitted."""

    def __post_init__(self) -> None:
        """Check the coefficients."""
        for name in ("quadratic_s", "edge_s", "piece_s", "linear_s", "base_s", "floor_s"):
            value = getattr(self, name)
            # Negative terms would break the lower bound, which sums them.
            if not (np.isfinite(value) and value >= 0):
                raise ScheduleError.at(f"cost.{name}", value, "not a finite number >= 0")
        if self.memory_tokens < 1:
            raise ScheduleError.at(
                "cost.memory_tokens", self.memory_tokens, "a rank must hold at least one token"
            )
        widths = [link.width for link in self.links]
        # `link` searches them by bisection.
        if widths != sorted(set(widths)):
            raise ScheduleError.at("cost.links", widths, "the widths do not rise")
        for link in self.links:
            if not (link.width > 1 and 0 <= link.latency_s < np.inf and 0 <= link.token_s < np.inf):
                raise ScheduleError.at(
                    "cost.links", link, "a width below 2, or a time that is not finite and >= 0"
                )

    def attention(self, length_K: ArrayLike, width: int | Ints = 1) -> Floats:
        """Return seconds of attention on each of `width` ranks, eq. (2), shape (K,)."""
        length = np.asarray(length_K, dtype=np.float64)
        seconds = self.quadratic_s * length * length / width + self.edge_s * length + self.piece_s
        # Length 0 is padding in the batched search of `refine`; it must not cost piece_s.
        return np.where(length > 0, seconds, 0.0)

    def linear(self, tokens: ArrayLike) -> Floats:
        """Return seconds of the linear layers for `tokens` on a rank, in the shape given."""
        tokens = np.asarray(tokens, dtype=np.float64)
        # A rank without tokens launches nothing, so it does not pay the floor.
        return np.maximum(self.floor_s, self.base_s + self.linear_s * tokens) * (tokens > 0)

    def link(self, width: int) -> Link:
        """Return the entry of the table for a CP group of `width`; the widest for wider groups."""
        if width == 1 or not self.links:
            return Link(width, 0.0, 0.0)
        index = bisect_left([link.width for link in self.links], width)
        return self.links[min(index, len(self.links) - 1)]

    def gather(self, tokens: ArrayLike, width_K: ArrayLike) -> Floats:
        """Return seconds to gather `tokens` over CP groups of `width_K` ranks, shape (K,)."""
        # One look-up per distinct width: a layout has a handful, a batch thousands of sequences.
        distinct_W = np.unique(np.asarray(width_K))
        links = [self.link(int(width)) for width in distinct_W]
        index_K = np.searchsorted(distinct_W, width_K)
        latency_K = np.array([link.latency_s for link in links])[index_K]
        token_s_K = np.array([link.token_s for link in links])[index_K]
        return latency_K + token_s_K * np.asarray(tokens)

    def work(self, length_K: ArrayLike, width_K: int | Ints = 1) -> Floats:
        """Return rank-seconds of sequences on `width_K` ranks each, shape (K,).

        Without gathers, base_s and floor_s: these belong to a micro-step and not to a sequence.
        """
        linear_K = self.linear_s * shard_tokens(length_K, width_K)
        return width_K * (self.attention(length_K, width_K) + linear_K)

    def min_widths(self, length_K: ArrayLike, widths: tuple[int, ...]) -> Ints:
        """Return the smallest of the rising `widths` that can hold each sequence, shape (K,)."""
        width_W = np.array(widths, dtype=np.int64)
        fits_KW = shard_tokens(np.asarray(length_K)[:, None], width_W) <= self.memory_tokens
        # argmax of booleans is the first True; `validate_lengths` ensures that there is one.
        return width_W[fits_KW.argmax(axis=1)]

    def document(self) -> dict[str, Any]:
        """Return the model in JSON types."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> CostModel:
        """Return the model of a `document()`.

        Raises:
            ScheduleError: If the format differs, or keys are unknown or missing.
        """
        if document.get("format") != FORMAT:
            raise ScheduleError.at(
                "cost.format",
                document.get("format"),
                f"this raymix reads cost models of format {FORMAT}",
                fix="Measure again",
            )
        values = {key: value for key, value in document.items() if key != "format"}
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ScheduleError.at(
                "cost", unknown, "unknown keys", allowed=f"Known: {', '.join(sorted(known))}"
            )
        try:
            # Missing and unknown keys of a link are a TypeError of its constructor.
            links = tuple(Link(**link) for link in values.pop("links", ()))
            return cls(**values, links=links)
        except TypeError as error:
            raise ScheduleError.at("cost", sorted(values), f"incomplete: {error}") from error


def shard_tokens(length_K: ArrayLike, width: int | Ints) -> Ints:
    """Return the tokens per rank of sequences on `width` ranks, padding to equal size included."""
    # Ceiling division in integers: floats round above 2^53, and signed, as -x of uint wraps.
    return -(-np.asarray(length_K, dtype=np.int64) // width)
