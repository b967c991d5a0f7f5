"""What finding the best shares costs, beside scipy's SLSQP: `python -m tests.benchmarks.optimize`.

BiMix has its optimum in closed form; additive laws are convex and come with a bound. The laws are
fitted to random tables before anything is timed. SLSQP gets the same analytic gradients and limits;
what it is worse (or better) by is relative to the objective. CPU seconds, one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from scipy.optimize import minimize

from raymix.laws import Law, Objective, build_law, make_table
from tests.benchmarks._report import ratio_spread, row, write_results

REPEATS = 5
SIZES = {"bimix": (8, 100, 1000), "additive": (8, 17, 50)}
SLOWEST = 100
"""Domains beyond which SLSQP, whose steps cost their cube, runs once."""


def fitted(kind: str, domains: int) -> Law:
    """Return a law fitted to a random table whose domains help themselves and a few others."""
    random = np.random.default_rng(domains)
    runs = 40 if kind == "bimix" else 4 * domains
    share_RD = random.dirichlet(np.full(domains, 1.0), runs)
    helps_DD = random.uniform(0.2, 1.0, domains) * np.eye(domains)
    helps_DD += 0.1 * random.uniform(size=(domains, domains)) / domains
    loss_RD = random.uniform(1.5, 2.5, domains) + 1 / (0.5 + np.sqrt(share_RD) @ helps_DD.T)
    columns: dict[str, list[object]] = {"run": [f"r{at}" for at in range(runs)]}
    columns |= {f"share.d{at}": share_RD[:, at].tolist() for at in range(domains)}
    columns |= {f"loss.d{at}": loss_RD[:, at].tolist() for at in range(domains)}
    law = build_law(kind)
    law.fit(make_table(columns, name="random"))
    return law


def tasks(law: Law) -> Iterator[tuple[str, Objective]]:
    """Yield what is asked of each law."""
    count = len(law.domains)
    caps = dict.fromkeys(law.domains[::2], 3 / count)
    floors = dict.fromkeys(law.domains[1::3], 0.3 / count)
    yield "free", Objective()
    yield "caps and floors", Objective(caps=caps, floors=floors)
    even = dict.fromkeys(law.domains, 1 / count)
    yield "near even shares", Objective(prior=even, kl=0.05)


def by_slsqp(law: Law, objective: Objective) -> float:
    """Return the value that SLSQP comes to from even shares."""
    count = len(law.domains)
    weight_V = np.full(len(law.targets), 1 / len(law.targets))
    low_D = np.array([max(objective.floors.get(d, 0.0), 1e-9) for d in law.domains])
    high_D = np.array([objective.caps.get(d, 1.0) for d in law.domains])

    def both(share_D: np.ndarray) -> tuple[float, np.ndarray]:
        loss_V, slope_VD = law.share_gradient(share_D)
        value, slope_D = float(weight_V @ loss_V), weight_V @ slope_VD
        if objective.kl:
            log_D = np.log(np.maximum(share_D, 1e-300) * count)
            value += objective.kl * float(share_D @ log_D)
            slope_D = slope_D + objective.kl * (log_D + 1)
        return value, slope_D

    solution = minimize(
        both,
        np.clip(np.full(count, 1 / count), low_D, high_D),
        jac=True,
        method="SLSQP",
        bounds=np.stack([low_D, high_D], axis=1),
        constraints={"type": "eq", "fun": lambda s: s.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    return float(solution.fun)


def raced(law: Law, objective: Objective, repeats: int) -> tuple[list[float], list[float], float]:
    """Return CPU seconds of both, in turn, and what SLSQP came to."""
    ours: list[float] = []
    theirs: list[float] = []
    value = np.nan
    for _ in range(repeats):
        began = time.process_time()
        law.minimize(objective)
        middle = time.process_time()
        value = by_slsqp(law, objective)
        ours.append(middle - began)
        theirs.append(time.process_time() - middle)
    return ours, theirs, value


def rows_of(kind: str, domains: int) -> Iterator[dict[str, object]]:
    """Yield one row for each task, having printed it."""
    law = fitted(kind, domains)
    for name, objective in tasks(law):
        optimum = law.minimize(objective)
        again = REPEATS if domains <= SLOWEST else 1
        ours, theirs, other = raced(law, objective, again)
        ratio, spread = ratio_spread(ours, theirs)
        worse = (other - optimum.value) / abs(optimum.value)
        gap = np.nan if optimum.gap is None else optimum.gap
        title = f"{kind}, {domains} domains, {name}"
        print(
            f"{title:38s}{optimum.method:>12s}{1e3 * float(np.median(ours)):10.2f}"
            f"{1e3 * float(np.median(theirs)):11.1f}{ratio:9.4f} "
            f"({spread[0]:.4f} to {spread[1]:.4f}){gap:10.1e}{worse:+10.1e}",
            flush=True,
        )
        result = row(
            title,
            float(np.median(ours)),
            "CPU s",
            ratio=ratio,
            spread=spread,
            baseline="scipy SLSQP",
        )
        yield result | {"method": optimum.method, "gap": optimum.gap, "slsqp_worse_by": worse}


def main() -> None:
    print(
        f"{'':38s}{'':>12s}{'ours, ms':>10s}{'SLSQP, ms':>11s}{'ratio':>9s}"
        f"{'(spread)':>20s}{'gap':>8s}{'SLSQP off':>12s}"
    )
    write_results(
        "optimize",
        [one for kind, sizes in SIZES.items() for n in sizes for one in rows_of(kind, n)],
    )


if __name__ == "__main__":
    main()
