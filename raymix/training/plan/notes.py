"""Lines below a plan: choices made for the user, and settings that may not be intended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from raymix.mixers.by_name import some
from raymix.recipe import (
    ClusterConfig,
    ConfigModel,
    EpochsMixer,
    PackedData,
    PretrainedModel,
    Recipe,
    ScheduleMixer,
    StaticMixer,
)
from raymix.recipe.shares import SUM_TOLERANCE, MixerModel
from raymix.store.remote.hub import fetch_config
from raymix.training.host.machine import Resources
from raymix.training.plan.domain_sizes import DomainSizes
from raymix.training.plan.forecast import Forecast
from raymix.training.plan.model_cost import ModelCost
from raymix.training.run.pinned_model import pretrained_repo

# Beyond about four passes repeated text teaches markedly less (Muennighoff et al. 2023, fig. 1).
_WARN_EPOCHS = 4.0
# A run is a whole number of steps, so its length is hardly ever that of the epochs exactly.
_SAME_LENGTH = 0.01
_WARN_DROPPED_FRACTION = 0.05


def cluster_notes(cluster: ClusterConfig, available: Resources) -> Iterator[str]:
    """Yield a line if the run waits for nodes of its cluster."""
    if available.missing:
        yield (
            f"cluster: {available.where} has {available.missing} too few now: the run asks for "
            f"nodes, and waits for up to {cluster.wait_minutes:g} minutes (cluster.wait_minutes)."
        )


def plan_notes(
    recipe: Recipe,
    sizes: Sequence[DomainSizes],
    forecast: Forecast,
    steps: int,
    cost: ModelCost,
) -> Iterator[str]:
    """Yield lines on choices made for the user, and on settings that may not be intended.

    Args:
        recipe: The recipe.
        sizes: Sizes of the domains.
        forecast: The tokens that will be read of each.
        steps: Steps of the run.
        cost: Cost of the model.

    Raises:
        StorageError: If the model is on the Hub, which cannot be reached.
    """
    yield from _model_source(recipe, cost.parameters)
    length, train = recipe.data.sequence_length, recipe.train
    if train.weight_decay and not cost.decays_weights:
        yield f"{train.optimizer} has no weight decay: train.weight_decay has no effect."
    targets = recipe.mixer.targets
    unread = [
        domain.name
        for domain, share in zip(sizes, forecast.share_D, strict=True)
        if share == 0 and domain.name not in targets
    ]
    if unread:
        yield f"without a share, so never read: {some(unread)}."
    for index, domain in enumerate(sizes):
        if domain.name in unread:
            continue
        if domain.usable == 0:
            yield f"{domain.name} does not fill a row of {length:,} tokens: others take its share."
            continue
        epochs = forecast.read_D[index] / domain.usable
        cap_step = forecast.cap_step_D[index]
        if np.isfinite(cap_step) and cap_step < steps:
            step = int(cap_step)
            yield f"{domain.name} reaches its max_epochs at step {step:,}; the others take over."
        elif epochs > _WARN_EPOCHS:
            yield f"{domain.name} is read {epochs:.1f} times; data.max_epochs would cap that."
        if domain.dropped > _WARN_DROPPED_FRACTION * domain.tokens:
            packed = isinstance(recipe.data, PackedData)
            reason = "do not fill rows" if packed else "are beyond the longest document"
            yield (
                f"{domain.dropped:,} of {domain.tokens:,} tokens of {domain.name} are never read: "
                f"they {reason} of {length:,} tokens."
            )
        if domain.unlearned:
            yield (
                f"{domain.unlearned:,} of {domain.documents:,} documents of {domain.name} are cut "
                f"before their first answer: they are read and teach nothing. Raise "
                f"data.sequence_length of {length:,}."
            )
        if domain.valid_tokens < length:
            yield f"{domain.name} has less than a row of held-out text: its held-out loss is noisy."
    yield from _rounded_shares(recipe.mixer)
    if isinstance(recipe.mixer, EpochsMixer):
        yield _epochs_note(recipe.mixer, sizes, int(forecast.read_D.sum()))
    if isinstance(recipe.mixer, ScheduleMixer):
        for number, piece in enumerate(recipe.mixer.pieces):
            if piece.step >= steps:
                yield f"mixer.pieces.{number} starts at step {piece.step:,}, after the last step."


def _epochs_note(mixer: EpochsMixer, sizes: Sequence[DomainSizes], run_tokens: int) -> str:
    """Return a line on the length of the run against that of the epochs as written."""
    tokens = {domain.name: domain.tokens for domain in sizes}
    needed = sum(count * tokens[name] for name, count in mixer.epochs.items())
    factor = run_tokens / max(needed, 1)
    if abs(factor - 1) < _SAME_LENGTH:
        return "mixer.epochs: the run is as long as the epochs take, to 1 %."
    first = next(name for name, count in mixer.epochs.items() if count > 0)
    return (
        f"mixer.epochs take {needed:,.0f} tokens, the run has {run_tokens:,}: every domain is "
        f"read {factor:.3g} times as often as written, {first} {factor * mixer.epochs[first]:.3g} "
        f"times. train.tokens={max(1, round(needed))} gives the epochs as written."
    )


def _rounded_shares(mixer: object) -> Iterator[str]:
    """Yield a line per mapping of shares that do not quite sum to 1, as rounding leaves them."""
    # A mixer of another package has fields of its own.
    if not isinstance(mixer, MixerModel):
        return
    if isinstance(mixer, StaticMixer | ScheduleMixer) and mixer.relative:
        return
    for field, shares in mixer.shares().items():
        total = math.fsum(shares.values())
        if abs(total - 1) > SUM_TOLERANCE:
            yield f"mixer.{field} sum to {total:.6g}: each share is divided by that."


def _model_source(recipe: Recipe, parameters: int) -> list[str]:
    """Return a line on a model that the recipe does not give, or on one of the Hub."""
    model = recipe.model
    if isinstance(model, ConfigModel) and model.is_default:
        return [
            f"model: none given; a small llama of {parameters:,} parameters is trained. Set "
            "model.config or model.path for another."
        ]
    repo = pretrained_repo(model) if isinstance(model, PretrainedModel) else None
    if repo is None:
        return []
    return [f"model: {repo.name} of the Hub, commit {fetch_config(repo).parent.name}"]
