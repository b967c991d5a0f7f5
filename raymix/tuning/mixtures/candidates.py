"""Which mixtures `tune` runs: limits on shares, the design, the references; and their recipes.

Shapes: N mixtures, D domains that are mixed.
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
"""Of a small run, where its recipe does not say how often."""
_DIGITS = 6
_MOST_NAMED = 20
_SMOKE_RUNS = 8
_SMOKE_STEPS = 20
_SMOKE = {"rows_per_step": 8, "sequence_length": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One mixture and where it comes from."""

    name: str
    """Of its run directory, without the seed."""
    origin: str
    """In words: of the design, a vertex, proposed by ..."""
    shares: Mapping[str, float]
    """By domain, summing to 1."""

    def document(self) -> dict[str, Any]:
        """Return JSON types."""
        return {"name": self.name, "origin": self.origin, "shares": dict(self.shares)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The mixtures that are allowed, and what there is to compare with."""

    domains: tuple[str, ...]
    """The D domains that are mixed."""
    targets: tuple[str, ...]
    """Domains that are measured only."""
    floor_D: Floats
    cap_D: Floats
    prior_D: Floats
    proportional_D: Floats

    def shares(self, share_D: Floats) -> dict[str, float]:
        """Return shares by name, rounded to six digits and still summing to 1."""
        rounded_D = np.round(share_D, _DIGITS)
        most = int(rounded_D.argmax())
        rounded_D[most] = round(1 - float(np.delete(rounded_D, most).sum()), _DIGITS)
        return dict(zip(self.domains, map(float, rounded_D), strict=True))

    def array(self, shares: Mapping[str, float]) -> Floats:
        """Return shares by name as an array, shape (D,)."""
        return np.array([shares.get(name, 0.0) for name in self.domains])


def space_of(recipe: Recipe, corpus: Corpus) -> Space:
    """Return what mixtures a recipe allows on a corpus.

    Raises:
        RecipeError: If its floors and caps leave no choice, or name what is not mixed.
    """
    config, held = recipe.tune, recipe.mixer.targets
    faults = [*_target_faults(held, corpus), *_name_faults(config, held, corpus)]
    if faults:
        raise RecipeError(*faults)
    usable = {s.name: s.usable for s in prepared_sizes(corpus, recipe.data) if s.name not in held}
    domains = tuple(usable)
    usable_D = np.array([usable[name] for name in domains], dtype=np.float64)
    proportional_D = usable_D / usable_D.sum()
    even = config.floor / len(domains)
    cap_D = np.minimum(
        np.array([config.caps.get(name, 1.0) for name in domains]),
        _epochs(recipe, domains) * usable_D / (steps_of(recipe) * recipe.data.step_tokens),
    )
    floor_D = np.array(
        [config.floors.get(name, min(even, cap)) for name, cap in zip(domains, cap_D, strict=True)]
    )
    try:
        check_limits(floor_D, cap_D, domains)
    except LawError as error:
        raise RecipeError(*(f"tune: {message}" for message in error.problems)) from error
    return Space(
        domains=domains,
        targets=tuple(held),
        floor_D=floor_D,
        cap_D=cap_D,
        prior_D=_prior(config, domains, proportional_D),
        proportional_D=proportional_D,
    )


def _target_faults(held: Sequence[str], corpus: Corpus) -> Iterator[str]:
    known = corpus.domain_names
    for name in held:
        if name not in known:
            yield _no_domain("mixer.targets", name, name, corpus)
    if set(known) <= set(held):
        yield format_problem(
            "mixer.targets",
            list(held),
            "every domain is a target",
            fix="Leave two domains or more to mix",
        )


def _name_faults(config: TuneConfig, held: Sequence[str], corpus: Corpus) -> Iterator[str]:
    """Yield what a recipe that lists no domains could not be told when it was read."""
    for field, values in config.by_domain().items():
        for name, value in values.items():
            path = f"tune.{field}.{name}"
            if name not in corpus.domain_names:
                yield _no_domain(path, value, name, corpus)
            elif name in held and value > 0 and field in ("floors", "prior"):
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
        fix=f"Known: {', '.join(known[:_MOST_NAMED])}",
    )


def refuse_few(config: TuneConfig, space: Space) -> None:
    """Raise RecipeError if a design is too short for any law, before anything runs."""
    extra = len(space.domains) * (config.vertices + config.leave_one_out)
    if config.runs + extra < MIN_RUNS:
        raise RecipeError.at(
            "tune.runs",
            config.runs,
            "too few runs for a law",
            allowed=f"Allowed: {MIN_RUNS} or more, and about two for each domain are of use",
        )


def _epochs(recipe: Recipe, domains: Sequence[str]) -> Floats:
    """Return the most passes over each domain in the recipe's own run, shape (D,)."""
    asked = recipe.tune.max_epochs or recipe.data.max_epochs
    if isinstance(asked, dict):
        return np.array([asked.get(name, np.inf) for name in domains])
    return np.full(len(domains), asked or np.inf)


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


def loss_weights(recipe: Recipe, space: Space) -> dict[str, float]:
    """Return the weight of each loss in what is minimized, summing to 1."""
    given = {name: weight for name, weight in recipe.tune.weights.items() if weight > 0}
    chosen = given or dict.fromkeys(space.targets or space.domains, 1.0)
    total = sum(chosen.values())
    return {name: weight / total for name, weight in chosen.items()}


def objective_of(recipe: Recipe, space: Space, *, horizon: float) -> Objective:
    """Return what to minimize, at so many steps."""
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


def designed(config: TuneConfig, space: Space) -> list[Mixture]:
    """Return the mixtures that are known beforehand; none is there twice.

    Raises:
        RecipeError: If the limits leave no such number of mixtures.
    """
    rows = [(share_D, config.design) for share_D in _design(config, space)]
    if config.vertices:
        rows += [(row_D, "vertex") for row_D in vertices(space.floor_D, space.cap_D)]
    if config.leave_one_out:
        left = leave_one_out(space.prior_D, space.floor_D, space.cap_D)
        rows += [(row_D, "one domain left out") for row_D in left]
    known: dict[tuple[float, ...], tuple[Floats, str]] = {}
    for share_D, origin in rows:
        known.setdefault(tuple(np.round(share_D, _DIGITS - 1)), (share_D, origin))
    return [
        Mixture(name=mixture_name(at), origin=origin, shares=space.shares(share_D))
        for at, (share_D, origin) in enumerate(known.values())
    ]


def mixture_name(at: int) -> str:
    """Return the name of the mixture that is run as number `at`, from 0."""
    return f"mix-{at:03d}"


def _design(config: TuneConfig, space: Space) -> Floats:
    runs = config.runs if config.mode == "design" else first_runs(config)
    limits: Any = {"floor_D": space.floor_D, "cap_D": space.cap_D, "seed": config.seed}
    try:
        if config.design == "space_filling":
            return space_filling_design(runs, **limits)
        if config.design == "d_optimal":
            return d_optimal_design(runs, features_for(config.law), **limits)
        return dirichlet_design(runs, space.prior_D, concentration=config.concentration, **limits)
    except LawError as error:
        raise RecipeError(*(f"tune: {message}" for message in error.problems)) from error


def first_runs(config: TuneConfig) -> int:
    """Return the runs of the design where others follow from them."""
    return config.initial or max(2, config.runs // 2)


def references(space: Space) -> list[Mixture]:
    """Return the mixtures that need no law: uniform and proportional."""
    even_D = np.full(len(space.domains), 1 / len(space.domains))
    return [
        Mixture(name="uniform", origin="reference", shares=space.shares(even_D)),
        Mixture(name="proportional", origin="reference", shares=space.shares(space.proportional_D)),
    ]


def optimum_mixture(shares: Mapping[str, float], space: Space) -> Mixture:
    """Return the law's optimum, under a name that only these shares have."""
    rounded = space.shares(space.array(shares))
    digest = hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()
    return Mixture(name=f"optimum-{digest[:6]}", origin="the law's optimum", shares=rounded)


def proxy_recipe(recipe: Recipe, *, smoke: bool = False) -> Recipe:
    """Return the recipe of the small runs, but for their mixtures; `smoke`: tiny ones.

    Caps on epochs are for the recipe's own run: a small run whose shares changed when a domain was
    used up would say nothing of its mixture.

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
    """Return the same search with a few runs and one seed to verify on."""
    runs = min(config.runs, _SMOKE_RUNS)
    initial = None if config.initial is None else min(config.initial, runs)
    verify = min(config.verify, 1)
    return config.model_copy(update={"runs": runs, "initial": initial, "verify": verify})


def smoke_changes(recipe: Recipe) -> list[str]:
    """Return the overrides that make runs of a recipe tiny."""
    steps = min(steps_of(recipe), _SMOKE_STEPS)
    found = [
        f"train.steps={steps}",
        "train.tokens=null",
        f"eval.every={max(1, steps // 4)}",
        f"eval.rows_per_domain={min(recipe.eval.rows_per_domain, 4)}",
    ]
    for name, most in _SMOKE.items():
        now = getattr(recipe.data, name, None)
        if now is not None:
            found.append(f"data.{name}={min(now, most)}")
    return found


def variant(proxy: Recipe, mixture: Mixture, *, out: str, seed: int | None = None) -> Variant:
    """Return the run of a mixture: a small run, or with a seed one that verifies.

    Args:
        proxy: The recipe of the small runs.
        mixture: What it reads.
        out: Directory of all runs, absolute.
        seed: Left out, the recipe's, and the run is named as the mixture.
    """
    name = mixture.name if seed is None else f"verify-{mixture.name}-seed{seed}"
    seed = proxy.seed if seed is None else seed
    mixer = StaticMixer(kind="static", weights=dict(mixture.shares), targets=proxy.mixer.targets)
    mixed = proxy.model_copy(update={"mixer": mixer, "tune": TuneConfig()})
    return Variant(mixture.name, seed, as_trial(mixed, f"{out}/{name}", seed, points=EVALUATIONS))
