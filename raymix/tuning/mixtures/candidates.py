"""Candidate mixtures of `tune`: limits on shares, design, references, and recipes of the runs.

Axes: N mixtures, D domains that are mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymix.errors import LawError, RaymixError, RecipeError, did_you_mean, format_problem
from raymix.laws import Objective
from raymix.laws.design import (
    check_limits,
    d_optimal_design,
    dirichlet_design,
    features_for,
    leave_one_out,
    space_filling_design,
    vertices,
)
from raymix.laws.models.fitted_law import MIN_RUNS
from raymix.recipe import Recipe, StaticMixer, TuneConfig, load_recipe
from raymix.store import Corpus
from raymix.training.plan.domain_sizes import prepared_sizes
from raymix.tuning.runs.variants import Variant, as_trial, changed_recipe, steps_of

Floats = NDArray[np.float64]

EVALUATIONS = 8
"""Evaluations of a proxy run, where its recipe sets no interval."""
# Shares stand in recipes and run identities: rounded, they are readable and compare equal after a
# round trip through YAML and JSON.
_DIGITS = 6
_MAX_NAMES = 20
_SMOKE_RUNS = 8
_SMOKE_STEPS = 20
_SMOKE_LIMITS = {"rows_per_step": 8, "sequence_length": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Shares of one run, and their origin."""

    name: str
    """Name of its run directory, without the seed."""
    origin: str
    """In words: name of the design, vertex, reference, or the proposer."""
    shares: Mapping[str, float]
    """Shares by domain, summing to 1."""

    def document(self) -> dict[str, Any]:
        """Return JSON types."""
        return {"name": self.name, "origin": self.origin, "shares": dict(self.shares)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSpace:
    """Feasible mixtures (floor and cap per domain), the prior, and proportional shares."""

    domains: tuple[str, ...]
    """The D domains that are mixed."""
    targets: tuple[str, ...]
    """Domains that are evaluated and never trained on."""
    floor_D: Floats
    cap_D: Floats
    prior_D: Floats
    proportional_D: Floats

    def shares(self, share_D: Floats) -> dict[str, float]:
        """Return shares by name, rounded to six digits and still summing to 1."""
        rounded_D = np.round(share_D, _DIGITS)
        # The largest share takes the rounding error: relative to itself it changes least.
        largest = int(rounded_D.argmax())
        rounded_D[largest] = round(1 - float(np.delete(rounded_D, largest).sum()), _DIGITS)
        return dict(zip(self.domains, map(float, rounded_D), strict=True))

    def array(self, shares: Mapping[str, float]) -> Floats:
        """Return shares by name as an array, shape (D,)."""
        return np.array([shares.get(name, 0.0) for name in self.domains])


def space_of(recipe: Recipe, corpus: Corpus) -> MixtureSpace:
    """Return the feasible mixtures of a recipe on a corpus.

    Raises:
        RecipeError: If floors and caps leave no mixture, or name a domain that is not mixed.
    """
    config, targets = recipe.tune, recipe.mixer.targets
    faults = [*_target_faults(targets, corpus), *_name_faults(config, targets, corpus)]
    if faults:
        raise RecipeError(*faults)
    # Usable tokens, not all: part of a shard does not fill a row of the sequence length.
    sizes = prepared_sizes(corpus, recipe.data)
    usable = {size.name: size.usable for size in sizes if size.name not in targets}
    domains = tuple(usable)
    usable_D = np.array([usable[name] for name in domains], dtype=np.float64)
    proportional_D = usable_D / usable_D.sum()
    # `tune.floor` is relative to an even share, so that it means the same for any D.
    even_floor = config.floor / len(domains)
    # For the recipe's own run, longer than a proxy run: epochs x tokens / tokens of the run.
    cap_D = np.minimum(
        np.array([config.caps.get(name, 1.0) for name in domains]),
        _max_epochs(recipe, domains) * usable_D / (steps_of(recipe) * recipe.data.step_tokens),
    )
    floor_D = np.array(
        [
            config.floors.get(name, min(even_floor, cap))
            for name, cap in zip(domains, cap_D, strict=True)
        ]
    )
    try:
        check_limits(floor_D, cap_D, domains)
    except LawError as error:
        raise RecipeError(*(f"tune: {message}" for message in error.problems)) from error
    return MixtureSpace(
        domains=domains,
        targets=tuple(targets),
        floor_D=floor_D,
        cap_D=cap_D,
        prior_D=_prior(config, domains, proportional_D),
        proportional_D=proportional_D,
    )


def _target_faults(targets: Sequence[str], corpus: Corpus) -> Iterator[str]:
    known = corpus.domain_names
    for name in targets:
        if name not in known:
            yield _no_domain("mixer.targets", name, name, corpus)
    if set(known) <= set(targets):
        yield format_problem(
            "mixer.targets",
            list(targets),
            "every domain is a target",
            fix="Leave two domains or more to mix",
        )


def _name_faults(config: TuneConfig, targets: Sequence[str], corpus: Corpus) -> Iterator[str]:
    """Yield faults in the names of `tune`'s fields by domain."""
    # A recipe without sources lists no domains, so loading it could not check these names.
    for field, values in config.by_domain().items():
        for name, value in values.items():
            path = f"tune.{field}.{name}"
            if name not in corpus.domain_names:
                yield _no_domain(path, value, name, corpus)
            elif name in targets and value > 0 and field in ("floors", "prior"):
                yield format_problem(
                    path,
                    value,
                    "a target is measured and never trained on",
                    fix="Its share must be 0",
                )


def _no_domain(path: str, value: object, name: str, corpus: Corpus) -> str:
    known = corpus.domain_names
    return format_problem(
        path,
        value,
        "no domain of the corpus has this name",
        allowed=did_you_mean(name, known),
        fix=f"Known: {', '.join(known[:_MAX_NAMES])}",
    )


def check_run_count(config: TuneConfig, space: MixtureSpace) -> None:
    """Raise RecipeError if a design has fewer runs than any law needs, before one starts."""
    extra = len(space.domains) * (config.vertices + config.leave_one_out)
    if config.runs + extra < MIN_RUNS:
        raise RecipeError.at(
            "tune.runs",
            config.runs,
            "too few runs for a law",
            allowed=f"Allowed: {MIN_RUNS} or more, and about two for each domain are of use",
        )


def _max_epochs(recipe: Recipe, domains: Sequence[str]) -> Floats:
    """Return the maximum epochs per domain in the recipe's own run, shape (D,)."""
    max_epochs = recipe.tune.max_epochs or recipe.data.max_epochs
    if isinstance(max_epochs, dict):
        return np.array([max_epochs.get(name, np.inf) for name in domains])
    return np.full(len(domains), max_epochs or np.inf)


def _prior(config: TuneConfig, domains: Sequence[str], proportional_D: Floats) -> Floats:
    if isinstance(config.prior, dict):
        given_D = np.array([config.prior.get(name, 0.0) for name in domains])
        if given_D.sum() > 0:
            return given_D / given_D.sum()
        raise RecipeError.at(
            "tune.prior", config.prior, "it gives no share to a domain that is mixed"
        )
    return (
        proportional_D
        if config.prior == "proportional"
        else np.full(len(domains), 1 / len(domains))
    )


def loss_weights(recipe: Recipe, space: MixtureSpace) -> dict[str, float]:
    """Return the weight of each loss in the objective, summing to 1."""
    given = {name: weight for name, weight in recipe.tune.weights.items() if weight > 0}
    # With targets only these count: the mixed domains are the means, not the aim.
    weights = given or dict.fromkeys(space.targets or space.domains, 1.0)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def objective_of(recipe: Recipe, space: MixtureSpace, *, horizon: float) -> Objective:
    """Return the objective to minimize; `horizon` is the number of steps it is evaluated at."""
    config = recipe.tune
    return Objective(
        weights=loss_weights(recipe, space),
        horizon=horizon,
        minimax=config.minimax,
        floors=dict(zip(space.domains, map(float, space.floor_D), strict=True)),
        caps=dict(zip(space.domains, map(float, space.cap_D), strict=True)),
        prior=dict(zip(space.domains, map(float, space.prior_D), strict=True)),
        kl=config.kl,
    )


def design_mixtures(config: TuneConfig, space: MixtureSpace) -> list[Mixture]:
    """Return the mixtures of the design, vertices and leave-one-out mixtures, without duplicates.

    Raises:
        RecipeError: If the limits leave too few mixtures.
    """
    rows = [(share_D, config.design) for share_D in _design(config, space)]
    if config.vertices:
        rows += [(row_D, "vertex") for row_D in vertices(space.floor_D, space.cap_D)]
    if config.leave_one_out:
        left_out = leave_one_out(space.prior_D, space.floor_D, space.cap_D)
        rows += [(row_D, "one domain left out") for row_D in left_out]
    # One digit less than shares keep: two mixtures closer than that are the same run.
    unique: dict[tuple[float, ...], tuple[Floats, str]] = {}
    for share_D, origin in rows:
        unique.setdefault(tuple(np.round(share_D, _DIGITS - 1)), (share_D, origin))
    return [
        Mixture(name=mixture_name(index), origin=origin, shares=space.shares(share_D))
        for index, (share_D, origin) in enumerate(unique.values())
    ]


def mixture_name(index: int) -> str:
    """Return the name of the mixture with this index in the order of runs, from 0."""
    return f"mix-{index:03d}"


def _design(config: TuneConfig, space: MixtureSpace) -> Floats:
    runs = config.runs if config.mode == "design" else initial_runs(config)
    limits: Any = {"floor_D": space.floor_D, "cap_D": space.cap_D, "seed": config.seed}
    try:
        if config.design == "space_filling":
            return space_filling_design(runs, **limits)
        if config.design == "d_optimal":
            return d_optimal_design(runs, features_for(config.law), **limits)
        return dirichlet_design(runs, space.prior_D, concentration=config.concentration, **limits)
    except LawError as error:
        raise RecipeError(*(f"tune: {message}" for message in error.problems)) from error


def initial_runs(config: TuneConfig) -> int:
    """Return the number of runs of the initial design of a sequential search."""
    return config.initial or max(2, config.runs // 2)


def references(space: MixtureSpace) -> list[Mixture]:
    """Return the reference mixtures, uniform and proportional, which need no law."""
    # Limits do not apply: they bound the search, and a reference only is compared with.
    even_D = np.full(len(space.domains), 1 / len(space.domains))
    return [
        Mixture(name="uniform", origin="reference", shares=space.shares(even_D)),
        Mixture(name="proportional", origin="reference", shares=space.shares(space.proportional_D)),
    ]


def optimum_mixture(shares: Mapping[str, float], space: MixtureSpace) -> Mixture:
    """Return the law's optimum as a mixture, named by a hash of its shares."""
    # Another fit gives another optimum; under one name its verification runs would be refused.
    rounded = space.shares(space.array(shares))
    digest = hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()
    return Mixture(name=f"optimum-{digest[:6]}", origin="the law's optimum", shares=rounded)


def proxy_recipe(recipe: Recipe, *, smoke: bool = False) -> Recipe:
    """Return the recipe of the proxy runs, without their mixtures; `smoke` makes the runs tiny.

    Caps on epochs apply to the recipe's own run only: a proxy run whose shares changed when a
    domain was exhausted would measure another mixture.

    Raises:
        RecipeError: If `tune.proxy` does not fit the recipe.
    """
    small = changed_recipe(recipe, recipe.tune.proxy, "tune.proxy")
    try:
        if smoke:
            small = load_recipe(small, smoke_changes(small))
        return load_recipe(small, ["data.max_epochs=null"])
    except RaymixError as error:
        raise RecipeError(*(f"tune.proxy: {message}" for message in error.problems)) from error


def smoke_config(config: TuneConfig) -> TuneConfig:
    """Return the same search with a few runs and at most one verification seed."""
    runs = min(config.runs, _SMOKE_RUNS)
    initial = None if config.initial is None else min(config.initial, runs)
    verify = min(config.verify, 1)
    return config.model_copy(update={"runs": runs, "initial": initial, "verify": verify})


def smoke_changes(recipe: Recipe) -> list[str]:
    """Return the overrides that make the runs of a recipe tiny."""
    steps = min(steps_of(recipe), _SMOKE_STEPS)
    overrides = [
        f"train.steps={steps}",
        "train.tokens=null",
        f"eval.every={max(1, steps // 4)}",
        f"eval.rows_per_domain={min(recipe.eval.rows_per_domain, 4)}",
    ]
    # Minima: a recipe that is smaller already stays as it is.
    for name, limit in _SMOKE_LIMITS.items():
        value = getattr(recipe.data, name, None)
        if value is not None:
            overrides.append(f"data.{name}={min(value, limit)}")
    return overrides


def variant(proxy: Recipe, mixture: Mixture, *, out: str, seed: int | None = None) -> Variant:
    """Return the run of a mixture: a proxy run, or a verification run where a seed is given.

    Args:
        proxy: The recipe of the proxy runs.
        mixture: Its shares.
        out: Absolute directory of all runs.
        seed: None for the recipe's seed and a run named as the mixture.
    """
    name = mixture.name if seed is None else f"verify-{mixture.name}-seed{seed}"
    seed = proxy.seed if seed is None else seed
    mixer = StaticMixer(kind="static", weights=dict(mixture.shares), targets=proxy.mixer.targets)
    # `tune` is reset: other search options must not change the identity of a run.
    mixed = proxy.model_copy(update={"mixer": mixer, "tune": TuneConfig()})
    return Variant(mixture.name, seed, as_trial(mixed, f"{out}/{name}", seed, points=EVALUATIONS))
