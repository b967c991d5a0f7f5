"""Designs: which mixtures to train small runs on, so that a law can be learned from them.

Every design is a pure function of its arguments and its seed, keeps within floors and caps, and
holds no mixture twice. Shapes: N mixtures of the design, C candidates, D domains, P features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raymix.errors import LawError, format_problem
from raymix.laws.table import Floats

_MIN_CANDIDATES = 512
_CANDIDATES_PER_RUN = 16
# Below it the gamma draws of a Dirichlet underflow to mixtures of one domain.
_MIN_ALPHA = 0.02
_SMALLEST_SHARE = 1e-300
_RESOLUTION = 1e-6
_MAX_ROUNDS = 100
_ROUNDS_IN_VAIN = 5
_MIN_DRAWS = 256
_EXCHANGES = 20
# Prior information per feature, in runs: with fewer runs than features the determinant is 0
# without it (DuMouchel and Jones 1994, "Bayesian D-optimal designs").
_PRIOR_RUNS = 0.1


def check_limits(floor_D: Floats, cap_D: Floats, names: tuple[str, ...]) -> None:
    """Refuse floors and caps between which there is not more than one mixture.

    Raises:
        LawError: With one message per fault.
    """
    faults = [
        format_problem(f"floor of {name}", float(low), f"above its cap of {high:.6g}")
        for name, low, high in zip(names, floor_D, cap_D, strict=True)
        if low > high
    ]
    if len(names) < 2:
        faults.append(format_problem("domains", list(names), "a mixture needs two domains or more"))
    if floor_D.sum() >= 1 - _RESOLUTION:
        total = float(floor_D.sum())
        faults.append(
            format_problem("floors", round(total, 6), "they sum to 1 or more", fix="Lower some")
        )
    if cap_D.sum() <= 1 + _RESOLUTION:
        total = float(cap_D.sum())
        faults.append(
            format_problem(
                "caps",
                round(total, 6),
                "they sum to no more than 1, which leaves no choice of mixture",
                fix="Raise some",
            )
        )
    if faults:
        raise LawError(*faults)


def within_limits(wanted_ND: Floats, floor_D: Floats, cap_D: Floats) -> Floats:
    """Return clip(c x wanted, floor, cap) with the c that makes each row sum to 1, shape (N, D).

    Among the mixtures within the limits it is the one nearest in KL(mixture || wanted). The
    limits must leave room: floors that sum to at most 1, caps to at least 1.
    """
    wanted_ND = np.maximum(np.atleast_2d(wanted_ND), _SMALLEST_SHARE)
    # The sum rises with c from that of the floors to that of the caps: bisection of log c.
    low_N = np.full(len(wanted_ND), np.log(_SMALLEST_SHARE))
    high_N = -low_N
    for _ in range(80):
        middle_N = (low_N + high_N) / 2
        total_N = np.clip(wanted_ND * np.exp(middle_N)[:, None], floor_D, cap_D).sum(axis=1)
        low_N = np.where(total_N < 1, middle_N, low_N)
        high_N = np.where(total_N < 1, high_N, middle_N)
    share_ND = np.clip(wanted_ND * np.exp(high_N)[:, None], floor_D, cap_D)
    return share_ND / share_ND.sum(axis=1, keepdims=True)


def dirichlet_design(
    runs: int,
    prior_D: Floats,
    *,
    concentration: float,
    floor_D: Floats,
    cap_D: Floats,
    seed: int,
) -> Floats:
    """Return draws from a Dirichlet distribution around a prior, shape (N, D).

    Its parameters are concentration x D x prior: with an even prior and a concentration of 1 all
    mixtures are equally likely; the larger it is, the nearer they are to the prior. What the floors
    leave is drawn, so that they bend nothing; a draw above a cap moves to the nearest mixture
    below. The first n of N runs are those of a design of n.

    Args:
        runs: Mixtures to draw.
        prior_D: Shares to draw around, shape (D,).
        concentration: > 0.
        floor_D: Least shares, shape (D,).
        cap_D: Largest shares, shape (D,).
        seed: Seeds the draws.

    Raises:
        LawError: If the limits leave no such number of different mixtures.
    """
    random = np.random.default_rng([seed, 1])
    alpha_D = np.maximum(concentration * prior_D.size * prior_D / prior_D.sum(), _MIN_ALPHA)
    return _different(runs, lambda n: random.dirichlet(alpha_D, n), floor_D, cap_D)


def space_filling_design(runs: int, *, floor_D: Floats, cap_D: Floats, seed: int) -> Floats:
    """Return mixtures spread evenly over all that the limits allow, shape (N, D).

    They are chosen one by one from uniform candidates so that their energy distance to the
    candidates falls fastest: kernel herding (Chen, Welling and Smola 2010) with the energy kernel,
    whose optimum are support points (Mak and Joseph 2018). Distances are between square roots of
    shares, so small shares count. The first n of N runs fill the space too.

    Raises:
        LawError: If the limits leave no such number of different mixtures.
    """
    share_CD = _candidates(runs, floor_D, cap_D, seed)
    root_CD = np.sqrt(share_CD)
    squared_CC = 2 - 2 * root_CD @ root_CD.T
    distance_CC = np.sqrt(np.maximum(squared_CC, 0))
    apart_C = np.zeros(len(share_CD))
    mean_C = distance_CC.mean(axis=1)
    chosen: list[int] = []
    for number in range(runs):
        score_C = mean_C - apart_C / (number + 1)
        score_C[chosen] = np.inf
        chosen.append(int(score_C.argmin()))
        apart_C += distance_CC[chosen[-1]]
    return share_CD[chosen]


def d_optimal_design(
    runs: int,
    features: Callable[[Floats], Floats],
    *,
    floor_D: Floats,
    cap_D: Floats,
    seed: int,
) -> Floats:
    """Return the mixtures that determine the coefficients of linear features best, shape (N, D).

    Maximizes log det(F'F + prior) over uniform candidates and the vertices, by Fedorov's exchange
    (1972) from a greedy start; the weak prior makes designs of fewer runs than features possible.

    Args:
        runs: Mixtures to choose.
        features: From shares (C, D) to features (C, P); they are scaled and get an intercept.
        floor_D: Least shares, shape (D,).
        cap_D: Largest shares, shape (D,).
        seed: Seeds the candidates.

    Raises:
        LawError: If the limits leave no such number of different mixtures.
    """
    corners = vertices(floor_D, cap_D)
    share_CD = _distinct(np.vstack([_candidates(runs, floor_D, cap_D, seed), corners]))
    raw_CP = features(share_CD)
    spread_P = raw_CP.std(axis=0)
    scaled_CP = (raw_CP - raw_CP.mean(axis=0)) / np.where(spread_P > 0, spread_P, 1.0)
    feature_CP = np.hstack([np.ones((len(share_CD), 1)), scaled_CP])
    information_PP = _PRIOR_RUNS * np.eye(feature_CP.shape[1])
    chosen: list[int] = []
    for _ in range(runs):
        chosen.append(_most_informative(feature_CP, information_PP, chosen))
        information_PP += np.outer(feature_CP[chosen[-1]], feature_CP[chosen[-1]])
    for _ in range(_EXCHANGES):
        if not _exchange(feature_CP, information_PP, chosen):
            break
    return share_CD[chosen]


def features_for(law: str) -> Callable[[Floats], Floats]:
    """Return the features that the D-optimal design of a law is for: (C, D) to (C, P).

    Laws with powers of shares (`bimix`, `additive`, `joint`, and `auto`, which may choose them) are
    nearly linear in log shares; all others in the shares themselves, of which the last follows
    from the others.
    """
    if law in ("bimix", "additive", "joint", "auto"):
        return lambda share_CD: np.log(np.maximum(share_CD, _RESOLUTION))
    return lambda share_CD: share_CD[:, :-1]


def vertices(floor_D: Floats, cap_D: Floats) -> Floats:
    """Return the mixtures with as much as may be of one domain, shape (D, D)."""
    return within_limits(np.eye(floor_D.size) + _RESOLUTION, floor_D, cap_D)


def leave_one_out(prior_D: Floats, floor_D: Floats, cap_D: Floats) -> Floats:
    """Return the prior less one domain each, which falls to its floor, shape (D, D)."""
    even_D = np.full(prior_D.size, 1 / prior_D.size)
    base_D = np.where(prior_D > 0, prior_D, _RESOLUTION * even_D)
    return within_limits(
        np.where(np.eye(prior_D.size) > 0, _SMALLEST_SHARE, base_D), floor_D, cap_D
    )


def _candidates(runs: int, floor_D: Floats, cap_D: Floats, seed: int) -> Floats:
    random = np.random.default_rng([seed, 2])
    count = max(_MIN_CANDIDATES, _CANDIDATES_PER_RUN * runs)
    even_D = np.ones(floor_D.size)
    return _different(count, lambda n: random.dirichlet(even_D, n), floor_D, cap_D, enough=runs)


def _different(
    count: int,
    draw: Callable[[int], Floats],
    floor_D: Floats,
    cap_D: Floats,
    *,
    enough: int | None = None,
) -> Floats:
    """Return `count` different draws within the limits, at least `enough` if there are no more."""
    found_ND = np.empty((0, floor_D.size))
    in_vain = 0
    for _ in range(_MAX_ROUNDS):
        known = len(found_ND)
        free_ND = floor_D + (1 - floor_D.sum()) * draw(max(count, _MIN_DRAWS))
        over_N = (free_ND > cap_D).any(axis=1)
        free_ND[over_N] = within_limits(free_ND[over_N], floor_D, cap_D)
        found_ND = _distinct(np.vstack([found_ND, free_ND]))
        if len(found_ND) >= count:
            return found_ND[:count]
        # Under narrow caps most draws move to the same few mixtures, so new ones are rare.
        in_vain = in_vain + 1 if len(found_ND) == known else 0
        if in_vain == _ROUNDS_IN_VAIN:
            break
    if enough is not None and len(found_ND) >= enough:
        return found_ND
    raise LawError.at(
        "runs",
        enough or count,
        f"between the floors and caps only {len(found_ND)} different mixtures were found",
        fix="Widen the limits, or take fewer runs",
    )


def _distinct(share_ND: Floats) -> Floats:
    """Return the rows in their order, less those that stood before."""
    rounded_ND = np.round(share_ND / _RESOLUTION).astype(np.int64)
    _, first = np.unique(rounded_ND, axis=0, return_index=True)
    return share_ND[np.sort(first)]


def _most_informative(
    feature_CP: Floats, information_PP: NDArray[np.float64], without: list[int]
) -> int:
    """Return the candidate that raises the determinant most: by the factor 1 + f' M^-1 f."""
    gain_C = np.einsum("cp,pc->c", feature_CP, np.linalg.solve(information_PP, feature_CP.T))
    gain_C[without] = -np.inf
    return int(gain_C.argmax())


def _exchange(feature_CP: Floats, information_PP: NDArray[np.float64], chosen: list[int]) -> bool:
    """Exchange each run for a better one, in place; return whether there was one."""
    changed = False
    for at, old in enumerate(chosen):
        information_PP -= np.outer(feature_CP[old], feature_CP[old])
        new = _most_informative(feature_CP, information_PP, chosen[:at] + chosen[at + 1 :])
        information_PP += np.outer(feature_CP[new], feature_CP[new])
        chosen[at] = new
        changed |= new != old
    return changed
