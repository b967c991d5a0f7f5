"""The mixer interface: `Mixer`, the statistics it reads, the registry and `build_mixer`.

A mixer is a pure function plus a small state. It never sees a model, a rank or Ray. Axes: D
domains, in the order of `MixerContext.domains`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from raymix.errors import RecipeError, did_you_mean
from raymix.recipe.plugins import MIXERS, PluginMixer
from raymix.recipe.shares import MixerModel
from raymix.recipe.translate import translate

Shares = NDArray[np.float64]
"""Shares of tokens, shape (D,), >= 0 and summing to 1."""

STATISTICS = {
    "tokens": "tokens_D",
    "loss": "loss_D",
    "valid_loss": "valid_loss_D",
    "grad_norm2": "grad_norm2_D",
    "grad_noise": "grad_noise_D",
    "gram": "gram_DD",
    "alignment": "alignment_D",
    "group_alignment": "group_alignment_N",
    "group_gram": "group_gram_NN",
}
"""What a mixer may need: the name in `Mixer.needs` and the field of `DomainStats`."""

GRADIENT_STATISTICS = frozenset(STATISTICS) - {"loss", "tokens", "valid_loss"}
"""Statistics that take a gradient probe; training computes the others anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStats:
    """Statistics of a window of steps, summed or averaged over all ranks."""

    step: int
    """First step of the window."""
    window: int
    """Steps in the window."""
    tokens_D: NDArray[np.int64]
    """Tokens of each domain that were trained on, shape (D,)."""
    loss_D: NDArray[np.float64]
    """Mean training loss in nats per token, shape (D,); NaN where a domain had no tokens."""
    grad_norm2_D: NDArray[np.float64] | None = None
    """Unbiased squared gradient norms, shape (D,); may be negative on noise, and NaN, as every
    gradient statistic, where a domain was not measured."""
    grad_noise_D: NDArray[np.float64] | None = None
    """Trace of the per-sequence gradient covariance, shape (D,)."""
    gram_DD: NDArray[np.float64] | None = None
    """Inner products of the domains' gradients, shape (D, D); unbiased on the diagonal."""
    alignment_D: NDArray[np.float64] | None = None
    """Inner products with the mean of the targets' gradients, shape (D,)."""
    valid_loss_D: NDArray[np.float64] | None = None
    """Held-out loss in nats per token, shape (D,)."""
    group_alignment_N: NDArray[np.float64] | None = None
    """Inner products of the gradients of the mixer's N `probe_groups` with the mean of the
    targets' gradients, shape (N,)."""
    group_gram_NN: NDArray[np.float64] | None = None
    """Inner products of the groups' gradients, shape (N, N); unbiased on the diagonal."""
    probe_passes: float = 1.0
    """Probe passes behind the gradient statistics: their weight in a mean over ranks."""


@dataclass(frozen=True, slots=True)
class MixerContext:
    """What a mixer may know about the run before it starts."""

    domains: tuple[str, ...]
    """Names; their order is the order of every D axis."""
    tokens_D: NDArray[np.int64]
    """Training tokens of each domain, shape (D,)."""
    total_tokens: int
    """Tokens of the whole run."""
    total_steps: int
    """Steps of the whole run."""
    rows_per_step: int = 1
    """Sequences in a global batch."""
    targets: tuple[str, ...] = ()
    """Domains that are measured and never trained on: their share is 0 under every mixer."""
    nearest_D: NDArray[np.int64] | None = None
    """Target documents that are nearest to each domain, shape (D,); for importance sampling."""

    empty: tuple[str, ...] = ()
    """Domains without a sample: shares that are requested during the run must be 0."""

    @property
    def mixed_D(self) -> NDArray[np.bool_]:
        """Return which domains may have a share: those that are not targets, shape (D,)."""
        targets = set(self.targets)
        return np.array([name not in targets for name in self.domains], dtype=np.bool_)


@runtime_checkable
class Mixer(Protocol):
    """Decides the shares of the domains, window by window."""

    @property
    def needs(self) -> frozenset[str]:
        """Return the statistics `update` reads, by the names of `STATISTICS`."""
        ...

    def update(self, stats: DomainStats) -> Shares:
        """Return the shares of the next window, from the statistics of the last."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        ...


@runtime_checkable
class PlannedMixer(Mixer, Protocol):
    """A mixer without statistics, whose shares are known for every step before the run."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Return the steps at which new shares must hold exactly, increasing."""
        ...

    def planned(self, step: int) -> Shares:
        """Return the shares of a window that starts at `step`."""
        ...


Factory = Callable[[Any, MixerContext], Mixer]


def mixer(kind: str, *, config: type[MixerModel] | None = None) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a factory `(config, context) -> Mixer` under `kind`.

    Packages outside raymix name the factory in the entry-point group `raymix.mixers`, and then any
    recipe can name the kind.

    Args:
        kind: The recipe's `mixer.kind`.
        config: Model of the recipe's `mixer` section, a subclass of `MixerModel` (of
            `AdaptiveModel` for a rule between guardrails); its fields are checked like those of
            raymix's own mixers. Left out, all further keys are attributes of the factory's
            `config`, unchecked.
    """

    def register(factory: Factory) -> Factory:
        MIXERS.factories[kind] = factory
        if config is not None:
            MIXERS.models[kind] = config
        return factory

    return register


def known_mixers() -> tuple[str, ...]:
    """Return the kinds that `build_mixer` can build, sorted."""
    return MIXERS.kinds()


def build_mixer(config: Any, context: MixerContext) -> Mixer:
    """Return the mixer that a recipe's `mixer` section describes.

    Raises:
        RecipeError: If its kind is unknown, or its values do not fit the context.
    """
    kind: str = config.kind
    # Entry points are loaded only for a kind that is asked for: importing a package may be slow.
    if kind not in MIXERS.factories:
        _load_plugin(kind)
    if kind not in MIXERS.factories:
        known = known_mixers()
        raise RecipeError.at(
            "mixer.kind",
            kind,
            "not a mixer",
            allowed=f"Known: {', '.join(known)}",
            fix=did_you_mean(kind, known),
        )
    config = _checked(config)
    return MIXERS.factories[kind](config, _with_targets(config, context))


def _checked(config: Any) -> Any:
    """Return a plugin's section as the model that it declared; any other config as it is."""
    model = MIXERS.models.get(config.kind)
    if model is None or not isinstance(config, PluginMixer):
        return config
    try:
        return model.model_validate(config.model_dump())
    except ValidationError as error:
        problems = translate(error.errors(include_url=False), model)
        raise RecipeError(*(f"mixer.{problem}" for problem in problems)) from None


def _with_targets(config: Any, context: MixerContext) -> MixerContext:
    """Return the context with the targets that the recipe's section names, checked."""
    # A mixer section may name targets of its own, beside those of the context.
    named = (*context.targets, *getattr(config, "targets", ()))
    targets = tuple(dict.fromkeys(named))
    known = set(context.domains)
    for name in targets:
        if name not in known:
            near = did_you_mean(name, context.domains)
            raise RecipeError.at("mixer.targets", name, "no domain of the corpus", fix=near)
    # Nothing would be left to train on.
    if len(targets) == len(known):
        raise RecipeError.at(
            "mixer.targets",
            targets,
            "every domain is a target",
            fix="Leave at least one domain to train on",
        )
    return replace(context, targets=targets)


def _load_plugin(kind: str) -> None:
    for point in MIXERS.entry_points(kind):
        try:
            # A decorator in the loaded module may have registered the kind already.
            MIXERS.factories.setdefault(kind, point.load())
        except (ImportError, AttributeError) as error:
            raise RecipeError.at(
                "mixer.kind", kind, f"its entry point {point.value!r} cannot be loaded ({error})"
            ) from error


def describe(built: Mixer) -> str:
    """Return one line on a mixer for plans and reports."""
    # Mixers of other packages need not have one: the protocol does not ask for it.
    summary = getattr(built, "summary", "")
    needs = ", ".join(sorted(built.needs))
    return summary or type(built).__name__ + (f", from {needs}" if needs else "")
