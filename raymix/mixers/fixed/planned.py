"""Fixed and scheduled mixers: shares that are known before the run.

Axes: D domains, P pieces of a schedule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import RecipeError
from raymix.mixers.base import DomainStats, Mixer, MixerContext, Shares, mixer
from raymix.mixers.by_name import shares_by_name
from raymix.recipe.mixer import (
    EpochsMixer,
    ImportanceMixer,
    ProportionalMixer,
    ScheduleMixer,
    StaticMixer,
    TemperatureMixer,
    UniformMixer,
    UnimaxMixer,
)
from raymix.recipe.shares import SUM_TOLERANCE


class Planned:
    """Shares that hold from given steps on, or move linearly between them.

    Attributes:
        needs: Empty: no statistics.
        boundaries: First steps of the pieces, the first 0.
        summary: One line for people.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        summary: str,
        shares_PD: Sequence[Shares],
        *,
        boundaries: Sequence[int] = (0,),
        linear: bool = False,
    ) -> None:
        self.summary = summary
        self.boundaries = tuple(boundaries)
        self._shares_PD = np.array(shares_PD, dtype=np.float64)
        # Handed out without a copy; a caller that wrote to them would change the mixture.
        self._shares_PD.setflags(write=False)
        self._linear = linear

    def planned(self, step: int) -> Shares:
        """Return the shares of a window that starts at `step`, shape (D,), read-only."""
        piece = max(0, bisect_right(self.boundaries, step) - 1)
        if not self._linear or piece + 1 == len(self.boundaries):
            return self._shares_PD[piece]
        start, end = self.boundaries[piece : piece + 2]
        fraction = (step - start) / (end - start)
        return (1 - fraction) * self._shares_PD[piece] + fraction * self._shares_PD[piece + 1]

    def update(self, stats: DomainStats) -> Shares:
        """Return the shares of the window after the one that `stats` describes."""
        return self.planned(stats.step + stats.window)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: shares are a function of the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept the empty state."""


@mixer("static")
def _static(config: StaticMixer, context: MixerContext) -> Mixer:
    shares_D = shares_by_name(
        config.weights, context, path="mixer.weights", relative=config.relative
    )
    return Planned("static: fixed shares", [shares_D])


@mixer("uniform")
def _uniform(config: UniformMixer, context: MixerContext) -> Mixer:
    mixed_D = context.mixed_D
    summary = f"uniform: the same share for each of {mixed_D.sum()} domains"
    return Planned(summary, [mixed_D / mixed_D.sum()])


@mixer("proportional")
def _proportional(config: ProportionalMixer, context: MixerContext) -> Mixer:
    shares_D = tempered(np.where(context.mixed_D, context.tokens_D, 0), 1.0)
    return Planned("proportional: shares as the domains' tokens", [shares_D])


@mixer("temperature")
def _temperature(config: TemperatureMixer, context: MixerContext) -> Mixer:
    tokens_D = np.where(context.mixed_D, context.tokens_D, 0)
    shares_D = tempered(tokens_D, config.temperature)
    return Planned(f"temperature {config.temperature:g}: shares as tokens ** (1/T)", [shares_D])


@mixer("epochs")
def _epochs(config: EpochsMixer, context: MixerContext) -> Mixer:
    # As ratios: the same checks of names and targets, and any sum.
    epochs_D = shares_by_name(config.epochs, context, path="mixer.epochs", relative=True)
    read_D = epochs_D * context.tokens_D
    if not read_D.any():
        raise RecipeError.at(
            "mixer.epochs",
            dict(config.epochs),
            "the domains with epochs have no tokens",
            fix="Give others an epoch",
        )
    return Planned("epochs: shares as epochs x tokens", [read_D / read_D.sum()])


@mixer("unimax")
def _unimax(config: UnimaxMixer, context: MixerContext) -> Mixer:
    tokens_D = np.where(context.mixed_D, context.tokens_D, 0)
    shares_D, capped_D = unimax(tokens_D, context.total_tokens, config.max_epochs)
    # All capped and still short of the run: no shares can read that many tokens.
    if capped_D.all() and shares_D.sum() * (1 + SUM_TOLERANCE) < context.total_tokens:
        available = int(tokens_D.sum())
        raise RecipeError.at(
            "mixer.max_epochs",
            config.max_epochs,
            (
                f"{config.max_epochs:g} epochs of all domains are "
                f"{config.max_epochs * available:.4g} tokens, "
                f"fewer than the run's {context.total_tokens:.4g}"
            ),
            allowed=f"It takes at least {context.total_tokens / max(available, 1):.3g} epochs",
            fix="Raise it, train fewer tokens, or add data",
        )
    capped = f"{int(capped_D.sum())} of {capped_D.size} domains at the cap"
    return Planned(
        f"unimax: uniform up to {config.max_epochs:g} epochs, {capped}",
        [shares_D / shares_D.sum()],
    )


@mixer("importance")
def _importance(config: ImportanceMixer, context: MixerContext) -> Mixer:
    """Build the mixer of CRISP (Grangier et al. 2024), with domains in the place of clusters."""
    even_D = context.mixed_D / context.mixed_D.sum()
    # `plan` runs before the corpus is prepared, when nothing has been counted yet.
    nearest_D = context.nearest_D
    if nearest_D is None or not nearest_D.any():
        unknown = "importance: shares are known once the corpus is prepared; even ones until then"
        return Planned(unknown, [even_D])
    shares_D = (1 - config.floor) * nearest_D / nearest_D.sum() + config.floor * even_D
    documents = f"{int(nearest_D.sum()):,} documents of {', '.join(context.targets)}"
    return Planned(f"importance: shares as {documents} are nearest to domains", [shares_D])


@mixer("schedule")
def _schedule(config: ScheduleMixer, context: MixerContext) -> Mixer:
    problems: list[str] = []
    shares_PD: list[Shares] = []
    for at, piece in enumerate(config.pieces):
        try:
            path = f"mixer.pieces.{at}.weights"
            shares_PD.append(
                shares_by_name(piece.weights, context, path=path, relative=config.relative)
            )
        except RecipeError as error:
            problems.extend(error.problems)  # every piece is checked before one is refused
    if problems:
        raise RecipeError(*problems)
    starts = [piece.step for piece in config.pieces]
    return Planned(
        f"schedule: {len(starts)} pieces, {config.interpolate}, the last from step {starts[-1]}",
        shares_PD,
        boundaries=starts,
        linear=config.interpolate == "linear",
    )


def tempered(tokens_D: NDArray[np.int64], temperature: float) -> Shares:
    """Return shares in proportion to tokens ** (1 / temperature), shape (D,); 0 for no tokens."""
    filled_D = tokens_D > 0
    exponent_D = np.full(tokens_D.size, -np.inf)
    # In logarithms: 1e12 tokens at a temperature of 0.01 overflow as a power.
    exponent_D[filled_D] = np.log(tokens_D[filled_D]) / temperature
    scaled_D = np.exp(exponent_D - exponent_D.max(initial=-1e300))
    return scaled_D / scaled_D.sum()


def unimax(
    tokens_D: NDArray[np.int64], total_tokens: int, max_epochs: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return tokens to read of each domain, shape (D,), and which domains stand at the cap.

    UniMax (Chung et al. 2023, algorithm 1): from the smallest domain up, each gets an equal part
    of the budget still left, but at most `max_epochs` times its tokens.
    """
    budget_D = np.zeros(tokens_D.size)
    capped_D = np.zeros(tokens_D.size, dtype=np.bool_)
    remaining = float(total_tokens)
    # Smallest first, so that what a capped domain leaves over goes to all larger ones.
    for rank, domain in enumerate(np.argsort(tokens_D, kind="stable")):
        even = remaining / (tokens_D.size - rank)
        cap = max_epochs * float(tokens_D[domain])
        capped_D[domain] = cap <= even
        budget_D[domain] = min(cap, even)
        remaining -= budget_D[domain]
    return budget_D, capped_D
