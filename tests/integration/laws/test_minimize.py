"""The best shares under any law: proved for convex ones, supported by many starts for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize as scipy_minimize

from raymix.errors import LawError
from raymix.laws import Objective, Optimum, Region, feasible, minimize, separable_optimum
from raymix.laws.table import Floats
from tests.support.law_forms import Form, Wells, exponential, inverse, own

LAWS = {
    "inverse-4": lambda: inverse(3, 4),
    "inverse-9": lambda: inverse(6, 9, seed=1),
    "exponential-4": lambda: exponential(3, 4),
    "exponential-9": lambda: exponential(6, 9, seed=1),
    "own-6": lambda: own(6),
}
TASKS: dict[str, dict[str, Any]] = {
    "sum": {},
    "weighted": {"weights": {"t0": 2.0, "t2": 0.5}},
    "limits": {"caps": {"d0": 0.1, "d1": 0.4}, "floors": {"d2": 0.25}},
    "capped at 0": {"caps": {"d1": 0.3}, "floors": {"d2": 0.1}, "weights": {"t0": 1.0}},
    "prior": {"kl": 0.05},
    "prior, limits": {"kl": 0.02, "caps": {"d0": 0.1}, "floors": {"d2": 0.4}},
    "minimax": {"minimax": True},
    "minimax, limits": {"minimax": True, "caps": {"d0": 0.2}, "floors": {"d2": 0.3}},
    "minimax, prior": {"minimax": True, "kl": 0.05},
}


def objective_of(law: Form, task: str) -> Objective:
    objective = Objective(**TASKS[task])
    if not objective.kl:
        return objective
    prior_D = np.random.default_rng(5).dirichlet(np.full(len(law.domains), 3.0))
    return replace(objective, prior=dict(zip(law.domains, prior_D.tolist(), strict=True)))


def by_solver(law: Form, objective: Objective) -> float:
    """Return the best value that SLSQP finds in the epigraph form, started where it stopped."""
    problem = feasible(objective, law.domains, law.targets)
    low, high = np.maximum(problem.region.low_A, 1e-7), problem.region.high_A
    counted = problem.weight_V > 0

    def value(r: Floats) -> float:
        return problem.value(law.predict(r[None])[0], r)

    def pull(r: Floats) -> Floats:
        prior = np.ones(r.size) if problem.prior_D is None else problem.prior_D
        return problem.kl * (np.log(r / prior) + 1)

    share = problem.region.center(np.full(low.size, 1 / low.size))
    best = value(share)
    for _ in range(12):
        if objective.minimax:
            top = float((problem.weight_V * law.predict(share[None])[0])[counted].max())
            actual = scipy_minimize(
                lambda x: x[-1] + problem.divergence(x[:-1]),
                np.append(share, top),
                jac=lambda x: np.append(pull(x[:-1]), 1.0),
                method="SLSQP",
                bounds=[*zip(low, high, strict=True), (None, None)],
                constraints=[
                    {
                        "type": "eq",
                        "fun": lambda x: x[:-1].sum() - 1,
                        "jac": lambda x: np.append(np.ones(low.size), 0.0),
                    },
                    {
                        "type": "ineq",
                        "fun": lambda x: (x[-1] - problem.weight_V * law.predict(x[None, :-1])[0])[
                            counted
                        ],
                        "jac": lambda x: np.column_stack(
                            [
                                -problem.weight_V[:, None] * law.share_gradient(x[:-1])[1],
                                np.ones(counted.size),
                            ]
                        )[counted],
                    },
                ],
                options={"maxiter": 200, "ftol": 1e-14},
            )
        else:
            actual = scipy_minimize(
                value,
                share,
                jac=lambda r: problem.weight_V @ law.share_gradient(r)[1] + pull(r),
                method="SLSQP",
                bounds=list(zip(low, high, strict=True)),
                constraints={"type": "eq", "fun": lambda r: r.sum() - 1, "jac": np.ones_like},
                options={"maxiter": 200, "ftol": 1e-14},
            )
        share = problem.region.project(np.log(np.clip(actual.x[: low.size], 1e-12, 1)))
        now = value(share)
        if now >= best - 1e-12 * abs(best):
            return min(now, best)
        best = now
    return best


def shares_of(optimum: Optimum) -> Floats:
    return np.array(list(optimum.shares.values()))


def check_allowed(optimum: Optimum, law: Form, objective: Objective) -> None:
    region = feasible(objective, law.domains, law.targets).region
    share = shares_of(optimum)
    assert share.sum() == pytest.approx(1, abs=1e-12)
    assert (share >= region.low_A).all()
    assert (share <= region.high_A).all()
    np.testing.assert_array_equal(list(optimum.losses.values()), law.predict(share[None])[0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", LAWS)
def test_no_general_solver_does_better_on_a_convex_law(name: str, task: str) -> None:
    law = LAWS[name]()
    objective = objective_of(law, task)
    actual = minimize(law, objective)
    check_allowed(actual, law, objective)
    assert actual.method == "convex"
    assert actual.gap is not None
    assert 0 <= actual.gap <= 1e-6 * actual.value
    reached = by_solver(law, objective)
    assert actual.value <= reached + 1e-6 * abs(reached)
    # What is proved holds against what another solver found.
    assert reached >= actual.value - actual.gap - 1e-12


def test_no_point_of_a_grid_does_better() -> None:
    law = inverse(4, 3, seed=7)
    steps = np.linspace(0, 1, 201)
    grid = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-12])
    losses = law.predict(np.maximum(grid, 0))
    for minimax, values in ((False, losses.mean(axis=1)), (True, losses.max(axis=1))):
        actual = minimize(law, Objective(minimax=minimax))
        assert actual.value <= values.min() + 1e-6
        assert values.min() - actual.value < 1e-3


def test_it_agrees_with_the_closed_form() -> None:
    law = own(40, seed=2)
    objective = Objective(caps={"d0": 0.01, "d1": 0.01}, floors={"d2": 0.2})
    actual = minimize(law, objective)
    region = feasible(objective, law.domains, law.targets).region
    exact = separable_optimum(np.diag(law.numbers["c"]) / 40, law.numbers["a"], region)
    assert actual.value == pytest.approx(exact.value, rel=1e-9)
    np.testing.assert_allclose(shares_of(actual), exact.share_D, rtol=1e-3)


def test_a_thousand_domains_need_few_evaluations() -> None:
    law = inverse(5, 1000)
    even = dict.fromkeys(law.domains, 1e-3)
    for objective in (
        Objective(caps=dict.fromkeys(law.domains[:300], 5e-4)),
        Objective(kl=0.05, prior=even),
    ):
        law.calls = 0
        actual = minimize(law, objective)
        assert actual.gap is not None
        assert actual.gap <= 1e-8 * actual.value
        assert law.calls < 60


def test_the_prior_draws_the_shares() -> None:
    law = inverse(3, 4)
    prior = {"d0": 0.7, "d1": 0.1, "d2": 0.1, "d3": 0.1}
    shares = [minimize(law, Objective(kl=kl, prior=prior)).shares["d0"] for kl in (1e-6, 0.1, 100)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.7, abs=3e-3)
    assert shares[0] == pytest.approx(minimize(law, Objective()).shares["d0"], abs=1e-3)


def test_the_horizon_reaches_the_law() -> None:
    law = inverse(2, 3)
    early, late = (minimize(law, Objective(horizon=step)).value for step in (100, 10_000))
    assert early - late == pytest.approx(0.1 - 0.01)


def test_a_domain_without_any_share_is_left_out_of_the_work() -> None:
    law = inverse(2, 3)
    actual = minimize(law, Objective(caps={"d1": 0}))
    assert actual.shares["d1"] == 0
    assert actual.gap is not None
    assert actual.gap < 1e-8


def test_fixed_shares_are_returned() -> None:
    law = inverse(2, 3)
    actual = minimize(law, Objective(floors={"d0": 0.5, "d1": 0.3, "d2": 0.2}))
    np.testing.assert_allclose(shares_of(actual), [0.5, 0.3, 0.2], rtol=1e-12)
    assert actual.gap == pytest.approx(0, abs=1e-12)


def test_a_single_domain_has_all() -> None:
    assert minimize(inverse(2, 1), Objective()).shares == {"d0": 1.0}


def wells() -> Wells:
    rng = np.random.default_rng(3)
    return Wells({"c": rng.dirichlet(np.ones(4), 6), "depth": rng.uniform(0.2, 1, 6)})


def test_many_starts_find_the_deepest_well() -> None:
    law = wells()
    actual = minimize(law, Objective())
    check_allowed(actual, law, Objective())
    assert (actual.method, actual.gap, actual.restarts) == ("restarts", None, 16)
    assert 1 <= actual.agreeing <= 16
    grid = np.random.default_rng(0).dirichlet(np.ones(4), 20_000)
    assert actual.value <= law.predict(grid).min() + 1e-9
    assert minimize(law, Objective()) == actual


def test_starts_keep_the_limits() -> None:
    law = wells()
    objective = Objective(
        caps={"d0": 0.2},
        floors={"d3": 0.3},
        kl=0.01,
        prior={"d0": 0.25} | dict.fromkeys(("d1", "d2", "d3"), 0.25),
    )
    actual = minimize(law, objective, starts=5)
    check_allowed(actual, law, objective)
    assert actual.restarts == 5


def test_a_law_that_claims_to_be_convex_is_found_out() -> None:
    law = wells()
    law.convex = True
    honest = minimize(wells(), Objective())
    actual = minimize(law, Objective())
    assert actual.gap is None or actual.value - actual.gap <= honest.value
    assert actual.method in ("restarts", "convex")


def test_predictions_that_are_not_finite_are_refused() -> None:
    law = own(3)
    with pytest.raises(LawError, match=r"not finite at shares that the objective allows; without "):
        minimize(law, Objective(caps={"d1": 0}))
    law.numbers["a"][0] = np.nan
    with pytest.raises(LawError, match=r"law\.predict\(t0\) = nan"):
        minimize(law, Objective())


def test_what_no_run_had_is_said() -> None:
    law = exponential(1, 3)
    law.most = 0.6
    actual = minimize(law, Objective())
    corner = max(actual.shares, key=lambda name: actual.shares[name])
    message = (
        f"shares beyond what any run had: {corner} (1, at most 0.6); cap them, or add runs there"
    )
    assert actual.warnings == (message,)
    assert actual.document()["warnings"] == [message]
    assert minimize(law, Objective(caps=dict.fromkeys(law.domains, 0.6))).warnings == ()


def test_losses_that_cannot_be_are_said() -> None:
    law = exponential(1, 2)

    def below(share_D: Floats, step: float) -> tuple[Floats, Floats]:
        loss_V, slope_VD = type(law).losses_at(law, share_D, step)
        return loss_V - 10, slope_VD

    law.losses_at = below  # type: ignore[method-assign] # one law, one test
    assert minimize(law, Objective()).warnings == ("losses of 0 or less are predicted for t0",)


def test_region_is_public() -> None:
    region = Region(low_A=np.zeros(2), high_A=np.ones(2))
    np.testing.assert_array_equal(region.vertex(np.array([1.0, 0.0])), [0, 1])
