"""Mixtures proposed one by one: a Ray Tune searcher over the simplex, by a law or by Optuna.

The searcher may be stopped after any run: what was proposed is on disk before it runs, and a new
searcher learns from the runs that are finished there. Shapes: C candidates, D domains.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from ray import tune
from ray.tune.search import Searcher

from raymix.errors import LawError, RecipeError
from raymix.laws import Law, MixtureTable, build_law, make_table
from raymix.laws.design import dirichlet_design, within_limits
from raymix.recipe import Recipe
from raymix.training.run.rundir import RunDirectory, read_metrics
from raymix.tuning.mixtures.candidates import Mixture, Space, mixture_name, objective_of
from raymix.tuning.mixtures.learn import value_of
from raymix.tuning.mixtures.search_log import SearchLog

Floats = NDArray[np.float64]

_FEWEST = 3
_CANDIDATES = 512
_AROUND = 50.0
# How near, in Hellinger distance, a candidate may be to what runs now before it counts for less.
_NEAR = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What a mixture came to at the end of its run."""

    mixture: Mixture
    losses: Mapping[str, float]
    value: float


class Proposer(Protocol):
    """Says which mixture to run next."""

    def finished(self, run: FinishedRun) -> None:
        """Learn what a mixture came to."""
        ...

    def next(self, number: int, running: Sequence[Mixture]) -> tuple[Floats, str] | None:
        """Return the shares of run `number`, and where they come from; None: wait for a run."""
        ...


class MixtureSearcher(Searcher):
    """Gives Tune the mixtures known, then those a proposer thinks worth a run."""

    def __init__(
        self,
        recipe: Recipe,
        record: SearchLog,
        names: Sequence[str],
        *,
        space: Space,
        out: Path,
        steps: int,
    ) -> None:
        """Begin with what is finished in `out`.

        Args:
            recipe: The recipe of the search.
            record: The mixtures so far; those proposed are added.
            names: Of the runs to make, in order; those not in the record are proposed.
            space: The mixtures allowed.
            out: Directory of the runs.
            steps: Steps of a run.
        """
        super().__init__(metric="state", mode="max")
        self._record, self._names, self._space, self._out = record, list(names), space, out
        self._objective = objective_of(recipe, space, horizon=float(steps))
        self._steps = steps
        self._running: dict[str, Mixture] = {}
        self._next = 0
        kind = LawProposer if recipe.tune.mode == "sequential" else OptunaProposer
        self._proposer: Proposer = kind(recipe, space, steps)
        for mixture in record.mixtures:
            self._tell(mixture)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return what Tune configures the next run with; None while there is too little to know."""
        name = self._names[self._next]
        known = {mixture.name: mixture for mixture in self._record.mixtures}
        mixture = known.get(name) or self._propose(name)
        if mixture is None:
            return None
        self._running[trial_id] = mixture
        self._next += 1
        return {"at": self._next - 1, "name": mixture.name, "shares": dict(mixture.shares)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn from a run that has ended."""
        mixture = self._running.pop(trial_id, None)
        if mixture is not None:
            self._tell(mixture)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the run directories hold all there is to know."""

    def restore(self, checkpoint_path: str) -> None:
        """Take up nothing."""

    def _propose(self, name: str) -> Mixture | None:
        number = len(self._record.mixtures)
        found = self._proposer.next(number, list(self._running.values()))
        if found is None:
            return None
        share_D, origin = found
        shares = self._space.shares(share_D)
        mixture = Mixture(name=mixture_name(number), origin=origin, shares=shares)
        assert mixture.name == name, "runs are proposed in order"
        self._record.add(mixture)
        return mixture

    def _tell(self, mixture: Mixture) -> None:
        losses = final_losses(self._out / mixture.name, self._steps)
        if losses is not None and all(n in losses for n in self._objective.weights or {}):
            value = value_of(self._objective, losses)
            self._proposer.finished(FinishedRun(mixture=mixture, losses=losses, value=value))


def final_losses(run: Path, steps: int) -> dict[str, float] | None:
    """Return the losses a run ended with; None where it has not come to its end."""
    lines = [line for line in read_metrics(RunDirectory(run).metrics) if "eval" in line]
    if not lines or lines[-1]["step"] < steps:
        return None
    return {name: float(row["loss"]) for name, row in lines[-1]["eval"].items()}


class LawProposer:
    """The mixture of the largest expected improvement under a law of the runs so far.

    Expected improvement (Jones, Schonlau and Welch 1998) of the value over the best one measured,
    by the law's own standard deviations. A candidate near to what runs now counts for less.
    """

    def __init__(self, recipe: Recipe, space: Space, steps: int) -> None:
        self._kind, self._seed = recipe.tune.law, recipe.tune.seed
        self._objective = objective_of(recipe, space, horizon=float(steps))
        self._space = space
        self._runs: list[FinishedRun] = []

    def finished(self, run: FinishedRun) -> None:
        """Learn what a mixture came to."""
        self._runs.append(run)

    def next(self, number: int, running: Sequence[Mixture]) -> tuple[Floats, str] | None:
        """Return the shares of run `number`, and where they come from; None: wait for a run."""
        if len(self._runs) < _FEWEST and running:
            return None
        share_CD = self._candidates(number)
        try:
            law = build_law(self._kind)
            report = law.fit(self._table())
            optimum = law.minimize(self._objective)
        except LawError:
            # Too little to learn from yet: look anywhere.
            return share_CD[0], "a draw: no law fits the runs so far"
        share_CD = np.vstack([share_CD, self._space.array(optimum.shares)])
        value_C, deviation_C = self._predicted(law, share_CD)
        gain_C = expected_improvement(value_C, deviation_C, min(run.value for run in self._runs))
        for mixture in running:
            apart_CD = np.sqrt(share_CD) - np.sqrt(self._space.array(mixture.shares))
            squared_C = np.square(apart_CD).sum(axis=1)
            gain_C *= 1 - np.exp(-squared_C / _NEAR**2)
        chosen = int(gain_C.argmax())
        origin = f"expected improvement {gain_C[chosen]:.2g} by {report.law}"
        return share_CD[chosen], origin

    def _candidates(self, number: int) -> Floats:
        """Return draws from all that is allowed, and draws around the best mixture so far."""
        space, size = self._space, len(self._space.domains)
        limits: Any = {"floor_D": space.floor_D, "cap_D": space.cap_D}
        seed = 1_000 * (self._seed + 1) + number
        best = min(self._runs, key=lambda run: run.value, default=None)
        best_D = space.prior_D if best is None else space.array(best.mixture.shares)
        wide = dirichlet_design(_CANDIDATES, np.ones(size), concentration=1.0, seed=seed, **limits)
        around = np.random.default_rng(seed).dirichlet(_AROUND * best_D + 0.05, _CANDIDATES)
        return np.vstack([wide, within_limits(around, space.floor_D, space.cap_D)])

    def _table(self) -> MixtureTable:
        runs, space = self._runs, self._space
        if len(runs) < _FEWEST:
            raise LawError.at("tune.initial", len(runs), "too few runs have ended well")
        names = [n for n in runs[0].losses if all(n in run.losses for run in runs)]
        columns: dict[str, Sequence[Any]] = {
            "run": [run.mixture.name for run in runs],
            **{f"share.{d}": [run.mixture.shares[d] for run in runs] for d in space.domains},
            **{f"loss.{name}": [run.losses[name] for run in runs] for name in names},
        }
        return make_table(columns)

    def _predicted(self, law: Law, share_CD: Floats) -> tuple[Floats, Floats]:
        """Return values and their standard deviations, shape (C,) each."""
        weights = self._objective.weights or {}
        at = [law.targets.index(name) for name in weights]
        weight_V = np.array(list(weights.values()))
        loss_CV = law.predict(share_CD)[:, at]
        deviation_CV = np.maximum(np.nan_to_num(law.deviation(share_CD)[:, at]), 1e-9)
        if self._objective.minimax:
            worst_C = (weight_V * loss_CV).argmax(axis=1)
            rows = np.arange(len(share_CD))
            return (weight_V * loss_CV)[rows, worst_C], (weight_V * deviation_CV)[rows, worst_C]
        # Errors of one mixture's losses mostly go the same way: deviations add up.
        return loss_CV @ weight_V, deviation_CV @ weight_V


def expected_improvement(value_C: Floats, deviation_C: Floats, best: float) -> Floats:
    """Return E[max(0, best - Y)] of normal Y, shape (C,), in the unit of the values."""
    from scipy.special import ndtr

    z_C = (best - value_C) / deviation_C
    density_C = np.exp(-np.square(z_C) / 2) / np.sqrt(2 * np.pi)
    return np.maximum(0.0, (best - value_C) * ndtr(z_C) + deviation_C * density_C)


class OptunaProposer:
    """Optuna's TPE through Ray Tune's own searcher, on the same mixtures: a baseline.

    Each domain has a number u in (0, 1); -log(u), divided by their sum, fill what the floors leave,
    so that even numbers are even over the simplex.
    """

    def __init__(self, recipe: Recipe, space: Space, steps: int) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise RecipeError.at(
                "tune.mode",
                recipe.tune.mode,
                "Optuna is not installed",
                fix="Run `pip install raymix[optuna]`",
            )
        from ray.tune.search.optuna import OptunaSearch

        self._space = space
        axes = {_axis(at): tune.uniform(1e-6, 1 - 1e-6) for at in range(len(space.domains))}
        self._search = OptunaSearch(metric="value", mode="min", seed=recipe.tune.seed)
        self._search.set_search_properties("value", "min", axes)
        self._asked: dict[str, str] = {}

    def finished(self, run: FinishedRun) -> None:
        """Learn what a mixture came to."""
        asked = self._asked.pop(run.mixture.name, None)
        if asked is not None:
            self._search.on_trial_complete(asked, {"value": run.value})
            return
        point = {_axis(at): float(u) for at, u in enumerate(self._numbers(run.mixture))}
        self._search.add_evaluated_point(point, run.value)

    def next(self, number: int, running: Sequence[Mixture]) -> tuple[Floats, str] | None:
        """Return the shares of run `number`, and where they come from."""
        asked = f"proposal-{number}"
        point = self._search.suggest(asked)
        if not isinstance(point, Mapping):
            return None
        self._asked[mixture_name(number)] = asked
        space = self._space
        part_D = -np.log([point[_axis(at)] for at in range(len(space.domains))])
        free_D = space.floor_D + (1 - space.floor_D.sum()) * part_D / part_D.sum()
        return within_limits(free_D, space.floor_D, space.cap_D)[0], "Optuna's TPE"

    def _numbers(self, mixture: Mixture) -> Floats:
        """Return numbers that stand for a mixture, shape (D,): -log(u) sums to their count."""
        free_D = np.maximum(self._space.array(mixture.shares) - self._space.floor_D, 1e-9)
        return np.clip(np.exp(-free_D / free_D.sum() * free_D.size), 1e-6, 1 - 1e-6)


def _axis(at: int) -> str:
    return f"u{at:05d}"
