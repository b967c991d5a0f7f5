"""The seam between a run and whatever decides its mixture: `Mixer`, what it sees, how it is built.

A mixer is a pure function plus a small state. It never sees a model, a rank or Ray. Shapes: D
domains, in the order of `MixerContext.domains`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from raymix.errors import RecipeError, did_you_mean, problem

Shares = NDArray[np.float64]
"""Shares of tokens, shape (D,), >= 0 and summing to 1."""

ENTRY_POINTS = "raymix.mixers"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStats:
    """What a window of steps showed, summed or averaged over all ranks."""

    step: int
    """First step of the window."""
    window: int
    """Steps in the window."""
    tokens_D: NDArray[np.int64]
    """Tokens of each domain that were trained on, shape (D,)."""
    loss_D: NDArray[np.float64]
    """Mean training loss in nats per token, shape (D,); NaN where a domain had no tokens."""
    grad_norm2_D: NDArray[np.float64] | None = None
    """Unbiased squared gradient norms, shape (D,); may be negative on noise."""
    grad_noise_D: NDArray[np.float64] | None = None
    """Trace of the per-sequence gradient covariance, shape (D,)."""
    gram_DD: NDArray[np.float64] | None = None
    """Inner products of the domains' gradients, shape (D, D)."""
    alignment_D: NDArray[np.float64] | None = None
    """Inner products with the target's gradient, shape (D,)."""


@dataclass(frozen=True, slots=True)
class MixerContext:
    """What a mixer may know about the run before it starts."""

    domains: tuple[str, ...]
    """Names; their order is the order of every D axis."""
    tokens_D: NDArray[np.int64]
    """Training tokens each domain holds, shape (D,)."""
    total_tokens: int
    """Tokens of the whole run."""
    total_steps: int
    """Steps of the whole run."""


@runtime_checkable
class Mixer(Protocol):
    """Decides the shares of the domains, window by window."""

    @property
    def needs(self) -> frozenset[str]:
        """Return the statistics `update` reads.

        Of loss, tokens, grad_norm2, grad_noise, alignment and gram.
        """
        ...

    def update(self, stats: DomainStats) -> Shares:
        """Return the shares of the next window, given what the last one showed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        ...


@runtime_checkable
class PlannedMixer(Mixer, Protocol):
    """A mixer that needs no statistics, so its shares are known beforehand."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Return the steps at which new shares must hold exactly, increasing."""
        ...

    def planned(self, step: int) -> Shares:
        """Return the shares of a window that starts at `step`."""
        ...


Factory = Callable[[Any, MixerContext], Mixer]
_FACTORIES: dict[str, Factory] = {}


def mixer(kind: str) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a factory `(config, context) -> Mixer` under `kind`.

    Packages outside raymix name the factory in the entry-point group `raymix.mixers`.
    """

    def register(factory: Factory) -> Factory:
        _FACTORIES[kind] = factory
        return factory

    return register


def known_mixers() -> tuple[str, ...]:
    """Return the kinds that `build_mixer` can build, sorted."""
    return tuple(sorted({*_FACTORIES, *entry_points(group=ENTRY_POINTS).names}))


def build_mixer(config: Any, context: MixerContext) -> Mixer:
    """Return the mixer that a recipe's `mixer` section describes.

    Raises:
        RecipeError: If its kind is unknown, or its values do not fit the context.
    """
    kind: str = config.kind
    if kind not in _FACTORIES:
        _load_plugin(kind)
    if kind not in _FACTORIES:
        known = known_mixers()
        raise RecipeError(
            problem(
                "mixer.kind",
                kind,
                "not a mixer",
                f"Known: {', '.join(known)}",
                did_you_mean(kind, known),
            )
        )
    return _FACTORIES[kind](config, context)


def _load_plugin(kind: str) -> None:
    for point in entry_points(group=ENTRY_POINTS, name=kind):
        try:
            _FACTORIES.setdefault(kind, point.load())
        except (ImportError, AttributeError) as error:
            wrong = f"its entry point {point.value!r} cannot be loaded ({error})"
            raise RecipeError(problem("mixer.kind", kind, wrong)) from error


def describe(built: Mixer) -> str:
    """Return one line about a mixer for plans and reports."""
    summary = getattr(built, "summary", "")
    needs = ", ".join(sorted(built.needs))
    return summary or type(built).__name__ + (f", from {needs}" if needs else "")
