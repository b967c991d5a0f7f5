"""From a table of runs to shares, on the command line; the exact optimum a thousand times."""

from __future__ import annotations

import numpy as np
import pytest

from raymix.laws import make_table, separable_optimum
from tests.integration.laws.test_separable import by_solver, check_solution, instance
from tests.support.shell import Shell

DOMAINS = ("web", "books", "code")


def write_runs(path: str) -> None:
    """Write 24 runs of three domains: losses of BiMix, 0.1 % noise, four steps each."""
    rng = np.random.default_rng(0)
    share = np.repeat(rng.dirichlet(np.full(3, 2.0), 24), 4, axis=0)
    step = np.tile([1000.0, 2000.0, 4000.0, 8000.0], 24)
    alpha, scale = np.array([0.05, 0.1, 0.2]), np.array([3.0, 2.5, 1.5])
    loss = scale * (0.7 + 3 * step[:, None] ** -0.3) * share**-alpha
    loss *= np.exp(rng.normal(0, 1e-3, loss.shape))
    columns = {"run": [f"run{at // 4}" for at in range(len(step))], "step": step.tolist()}
    columns |= {f"share.{name}": share[:, at].tolist() for at, name in enumerate(DOMAINS)}
    columns |= {f"loss.{name}": loss[:, at].tolist() for at, name in enumerate(DOMAINS)}
    make_table(columns).write(path)


@pytest.mark.parametrize("kind", ["bimix", "additive", "auto"])
def test_from_runs_to_shares(shell: Shell, kind: str) -> None:
    write_runs(str(shell.cwd / "runs.csv"))
    shell.json("fit", "runs.csv", "--law", kind, "--out", f"{kind}.json")
    optimum = shell.json("optimize", f"{kind}.json", "--horizon", "16000", "--cap", "code=0.4")
    shares = optimum["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    assert shares["code"] <= 0.4
    # The truth at 16,000 steps: shares in proportion to (alpha K)^(1 / (1 + alpha)), code capped.
    alpha, scale = np.array([0.05, 0.1]), np.array([3.0, 2.5]) * (0.7 + 3 * 16000**-0.3)
    slope = np.linspace(0.1, 5, 200_001)
    total = ((alpha * scale / slope[:, None]) ** (1 / (1 + alpha))).sum(axis=1)
    truth = (alpha * scale / slope[np.argmin(np.abs(total - 0.6))]) ** (1 / (1 + alpha))
    tolerance = 0.02 if kind == "bimix" else 0.1
    assert shares["web"] == pytest.approx(truth[0], abs=tolerance)
    assert shares["books"] == pytest.approx(truth[1], abs=tolerance)
    reference = optimum["reference"]
    assert np.mean(list(optimum["losses"].values())) < np.mean(list(reference["losses"].values()))
    if kind == "bimix":
        assert optimum["method"] == "closed form"
        assert optimum["gap"] < 1e-12


def test_the_exact_optimum_is_that_of_a_solver_a_thousand_times() -> None:
    for seed in range(1000):
        scale, exponent, offset, region = instance(seed)
        solution = separable_optimum(scale, exponent, region, offset_D=offset)
        check_solution(solution, region)
        _, value = by_solver(scale, exponent, offset, region)
        assert solution.value <= value * (1 + 1e-9), seed
        assert solution.value == pytest.approx(value, rel=1e-6), seed
