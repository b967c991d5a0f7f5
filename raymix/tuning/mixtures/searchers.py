"""Sequential proposals of mixtures: a Ray Tune searcher over the simplex, by a law or by Optuna.

The searcher may be stopped after any run: a proposal is on disk before its run starts, and a new
searcher learns from the finished runs there. Axes: C candidates, D domains, V weighted losses.
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
from raymix.tuning.mixtures.candidates import Mixture, MixtureSpace, mixture_name, objective_of
from raymix.tuning.mixtures.learn import value_of
from raymix.tuning.mixtures.search_log import SearchLog

Floats = NDArray[np.float64]

_MIN_RUNS = 3
_CANDIDATES = 512
# Dirichlet concentration of local draws: a share of 0.2 then varies by about 0.06.
_LOCAL_CONCENTRATION = 50.0
# Radius, in sqrt-share distance, within which a running mixture lowers a candidate's gain.
_PENALTY_RADIUS = 0.15
# Added to the parameters of the Dirichlet, which must be positive also for a share of 0.
_MIN_ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """Final losses and objective value of a mixture, in nats per token."""

    mixture: Mixture
    losses: Mapping[str, float]
    value: float


class Proposer(Protocol):
    """Strategy that proposes the next mixture."""

    def finished(self, run: FinishedRun) -> None:
        """Add the result of a finished run."""
        ...

    def next(self, number: int, running: Sequence[Mixture]) -> tuple[Floats, str] | None:
        """Return the shares, shape (D,), and the origin of run `number`; None: wait for a run."""
        ...


class MixtureSearcher(Searcher):
    """Ray Tune searcher: first the logged mixtures, then those of a proposer."""

    def __init__(
        self,
        recipe: Recipe,
        log: SearchLog,
        names: Sequence[str],
        *,
        space: MixtureSpace,
        out: Path,
        steps: int,
    ) -> None:
        """Initialize the proposer with the finished runs in `out`.

        Args:
            recipe: The recipe of the search.
            log: The mixtures so far; proposed ones are added.
            names: Names of the runs to make, in order; those not in the log are proposed.
            space: The feasible mixtures.
            out: Directory of the runs.
            steps: Steps of a run.
        """
        # Tune needs the name of a reported metric; values are read from the run directories.
        super().__init__(metric="state", mode="max")
        self._log, self._names, self._space, self._out = log, list(names), space, out
        self._objective = objective_of(recipe, space, horizon=float(steps))
        self._steps = steps
        self._running: dict[str, Mixture] = {}
        self._next = 0
        kind = LawProposer if recipe.tune.mode == "sequential" else OptunaProposer
        self._proposer: Proposer = kind(recipe, space, steps)
        for mixture in log.mixtures:
            self._report(mixture)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the config of the next trial; None while the proposer waits for results."""
        name = self._names[self._next]
        known = {mixture.name: mixture for mixture in self._log.mixtures}
        mixture = known.get(name) or self._propose(name)
        if mixture is None:
            return None
        self._running[trial_id] = mixture
        self._next += 1
        return {"at": self._next - 1, "name": mixture.name, "shares": dict(mixture.shares)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Give the result of a finished trial to the proposer."""
        mixture = self._running.pop(trial_id, None)
        if mixture is not None:
            self._report(mixture)

    def save(self, checkpoint_path: str) -> None:
        """No-op: run directories hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """No-op: run directories hold the state."""

    def _propose(self, name: str) -> Mixture | None:
        number = len(self._log.mixtures)
        proposal = self._proposer.next(number, list(self._running.values()))
        if proposal is None:
            return None
        share_D, origin = proposal
        shares = self._space.shares(share_D)
        mixture = Mixture(name=mixture_name(number), origin=origin, shares=shares)
        assert mixture.name == name, "runs are proposed in order"
        # Before the run starts: a killed search resumes with the same mixture.
        self._log.add(mixture)
        return mixture

    def _report(self, mixture: Mixture) -> None:
        losses = final_losses(self._out / mixture.name, self._steps)
        if losses is not None and all(n in losses for n in self._objective.weights or {}):
            value = value_of(self._objective, losses)
            self._proposer.finished(FinishedRun(mixture=mixture, losses=losses, value=value))


def final_losses(run: Path, steps: int) -> dict[str, float] | None:
    """Return the losses at the last step of a run; None if it has not reached it."""
    lines = [line for line in read_metrics(RunDirectory(run).metrics) if "eval" in line]
    if not lines or lines[-1]["step"] < steps:
        return None
    return {name: float(row["loss"]) for name, row in lines[-1]["eval"].items()}


class LawProposer:
    """Proposes the mixture with the largest expected improvement under a law of the finished runs.

    Expected improvement (Jones, Schonlau and Welch 1998) over the best measured value, with the
    law's own standard deviations. Candidates close to running mixtures are penalized.
    """

    def __init__(self, recipe: Recipe, space: MixtureSpace, steps: int) -> None:
        self._kind, self._seed = recipe.tune.law, recipe.tune.seed
        self._objective = objective_of(recipe, space, horizon=float(steps))
        self._space = space
        self._runs: list[FinishedRun] = []

    def finished(self, run: FinishedRun) -> None:
        """Add the result of a finished run."""
        self._runs.append(run)

    def next(self, number: int, running: Sequence[Mixture]) -> tuple[Floats, str] | None:
        """Return the shares, shape (D,), and the origin of run `number`; None: wait for a run."""
        if len(self._runs) < _MIN_RUNS and running:
            return None
        share_CD = self._candidates(number)
        try:
            law = build_law(self._kind)
            report = law.fit(self._table())
            optimum = law.minimize(self._objective)
        except LawError:
            # Too few or degenerate runs so far: take a random mixture.
            return share_CD[0], "a draw: no law fits the runs so far"
        # The optimum of the law is seldom among random draws.
        share_CD = np.vstack([share_CD, self._space.array(optimum.shares)])
        value_C, deviation_C = self._predicted(law, share_CD)
        gain_C = expected_improvement(value_C, deviation_C, min(run.value for run in self._runs))
        # Runs in parallel: their results are unknown, so without a penalty one mixture would be
        # proposed again. A stand-in for conditioning the law on them.
        for mixture in running:
            # Hellinger distance up to a factor: it resolves small shares better than differences.
            difference_CD = np.sqrt(share_CD) - np.sqrt(self._space.array(mixture.shares))
            squared_C = np.square(difference_CD).sum(axis=1)
            gain_C *= 1 - np.exp(-squared_C / _PENALTY_RADIUS**2)
        chosen = int(gain_C.argmax())
        origin = f"expected improvement {gain_C[chosen]:.2g} by {report.law}"
        return share_CD[chosen], origin

    def _candidates(self, number: int) -> Floats:
        """Return feasible draws, shape (C, D): half uniform, half around the best mixture."""
        space, size = self._space, len(self._space.domains)
        limits: Any = {"floor_D": space.floor_D, "cap_D": space.cap_D}
        # Depends on the run alone: a resumed search draws the same candidates.
        seed = 1_000 * (self._seed + 1) + number
        best = min(self._runs, key=lambda run: run.value, default=None)
        best_D = space.prior_D if best is None else space.array(best.mixture.shares)
        wide = dirichlet_design(_CANDIDATES, np.ones(size), concentration=1.0, seed=seed, **limits)
        around = np.random.default_rng(seed).dirichlet(
            _LOCAL_CONCENTRATION * best_D + _MIN_ALPHA, _CANDIDATES
        )
        return np.vstack([wide, within_limits(around, space.floor_D, space.cap_D)])

    def _table(self) -> MixtureTable:
        runs, space = self._runs, self._space
        if len(runs) < _MIN_RUNS:
            raise LawError.at("tune.initial", len(runs), "too few runs have ended well")
        names = [n for n in runs[0].losses if all(n in run.losses for run in runs)]
        columns: dict[str, Sequence[Any]] = {
            "run": [run.mixture.name for run in runs],
            **{f"share.{d}": [run.mixture.shares[d] for run in runs] for d in space.domains},
            **{f"loss.{name}": [run.losses[name] for run in runs] for name in names},
        }
        return make_table(columns)

    def _predicted(self, law: Law, share_CD: Floats) -> tuple[Floats, Floats]:
        """Return objective values and their standard deviations, shape (C,) each."""
        weights = self._objective.weights or {}
        columns = [law.targets.index(name) for name in weights]
        weight_V = np.array(list(weights.values()))
        loss_CV = law.predict(share_CD)[:, columns]
        # Positive: expected improvement divides by it.
        deviation_CV = np.maximum(np.nan_to_num(law.deviation(share_CD)[:, columns]), 1e-9)
        if self._objective.minimax:
            worst_C = (weight_V * loss_CV).argmax(axis=1)
            rows = np.arange(len(share_CD))
            return (weight_V * loss_CV)[rows, worst_C], (weight_V * deviation_CV)[rows, worst_C]
        # Errors of one mixture's losses are correlated: deviations add up linearly.
        return loss_CV @ weight_V, deviation_CV @ weight_V


def expected_improvement(value_C: Floats, deviation_C: Floats, best: float) -> Floats:
    """Return E[max(0, best - Y)] of normal Y, shape (C,), in the unit of the values."""
    from scipy.special import ndtr

    z_C = (best - value_C) / deviation_C
    density_C = np.exp(-np.square(z_C) / 2) / np.sqrt(2 * np.pi)
    # Both terms cancel far above `best`: rounding would give gains below 0.
    return np.maximum(0.0, (best - value_C) * ndtr(z_C) + deviation_C * density_C)


class OptunaProposer:
    """Optuna's TPE through Ray Tune's own searcher, on the same mixtures: a baseline.

    Each domain has a coordinate u in (0, 1). The values -log(u), divided by their sum, distribute
    the mass above the floors: uniform coordinates are then uniform on the simplex.
    """

    def __init__(self, recipe: Recipe, space: MixtureSpace, steps: int) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise RecipeError.at(
                "tune.mode",
                recipe.tune.mode,
                "Optuna is not installed",
                fix="Run `pip install raymix[optuna]`",
            )
        from ray.tune.search.optuna import OptunaSearch

        self._space = space
        # Away from 0 and 1, where -log(u) is infinite or 0.
        axes = {_axis(index): tune.uniform(1e-6, 1 - 1e-6) for index in range(len(space.domains))}
        self._search = OptunaSearch(metric="value", mode="min", seed=recipe.tune.seed)
        self._search.set_search_properties("value", "min", axes)
        self._trial_ids: dict[str, str] = {}

    def finished(self, run: FinishedRun) -> None:
        """Add the result of a finished run."""
        trial_id = self._trial_ids.pop(run.mixture.name, None)
        if trial_id is not None:
            self._search.on_trial_complete(trial_id, {"value": run.value})
            return
        # A run of the initial design or of an earlier process: its coordinates are inverted.
        point = {_axis(index): float(u) for index, u in enumerate(self._coordinates(run.mixture))}
        self._search.add_evaluated_point(point, run.value)

    def next(self, number: int, running: Sequence[Mixture]) -> tuple[Floats, str] | None:
        """Return the shares, shape (D,), and the origin of run `number`; None: no proposal yet."""
        trial_id = f"proposal-{number}"
        point = self._search.suggest(trial_id)
        # None: wait; the string FINISHED: no more proposals.
        if not isinstance(point, Mapping):
            return None
        self._trial_ids[mixture_name(number)] = trial_id
        space = self._space
        part_D = -np.log([point[_axis(index)] for index in range(len(space.domains))])
        free_D = space.floor_D + (1 - space.floor_D.sum()) * part_D / part_D.sum()
        return within_limits(free_D, space.floor_D, space.cap_D)[0], "Optuna's TPE"

    def _coordinates(self, mixture: Mixture) -> Floats:
        """Return coordinates of a mixture, shape (D,)."""
        # Any scale of -log(u) gives the same shares; a sum of D is the mean of uniform coordinates.
        free_D = np.maximum(self._space.array(mixture.shares) - self._space.floor_D, 1e-9)
        return np.clip(np.exp(-free_D / free_D.sum() * free_D.size), 1e-6, 1 - 1e-6)


def _axis(index: int) -> str:
    # Padded, so that sorted by name, as in Optuna, axes are in the order of the domains.
    return f"u{index:05d}"
