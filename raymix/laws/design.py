"""Experimental designs: the mixtures to train small runs on, for fitting a law.

A design is a pure function of its arguments and its seed, lies within floors and caps, and has no
mixture twice.

Shapes: N mixtures of the design, C candidates, D domains, P features.
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
# Stands for 0 where a log is taken; a normal float64 (subnormals lose digits).
_TINY_SHARE = 1e-300
# Mixtures closer than this are one mixture: runs of finite length cannot tell them apart.
_RESOLUTION = 1e-6
_MAX_ROUNDS = 100
_MAX_STALLED_ROUNDS = 5
# One vectorized draw of many costs as much as one of few, and most survive the removal of doubles.
_MIN_DRAWS = 256
# Fedorov's exchange converges in a few passes; the bound is for cycles from rounding.
_MAX_EXCHANGE_PASSES = 20
# Prior information per feature, in runs: with fewer runs than features the determinant is 0
# without it (DuMouchel and Jones 1994, "Bayesian D-optimal designs").
_PRIOR_RUNS = 0.1


def check_limits(floor_D: Floats, cap_D: Floats, names: tuple[str, ...]) -> None:
    """Check that floors and caps allow more than one mixture.

    Raises:
        LawError: With one message per fault.
    """
    problems = [
        format_problem(f"floor of {name}", float(low), f"above its cap of {high:.6g}")
        for name, low, high in zip(names, floor_D, cap_D, strict=True)
        if low > high
    ]
    if len(names) < 2:
        problems.append(
            format_problem("domains", list(names), "a mixture needs two domains or more")
        )
    if floor_D.sum() >= 1 - _RESOLUTION:
        total = float(floor_D.sum())
        problems.append(
            format_problem("floors", round(total, 6), "they sum to 1 or more", fix="Lower some")
        )
    if cap_D.sum() <= 1 + _RESOLUTION:
        total = float(cap_D.sum())
        problems.append(
            format_problem(
                "caps",
                round(total, 6),
                "they sum to at most 1, so there is no choice of mixture",
                fix="Raise some",
            )
        )
    if problems:
        raise LawError(*problems)


def within_limits(target_ND: Floats, floor_D: Floats, cap_D: Floats) -> Floats:
    """Return clip(c x target, floor, cap) with the c that makes each row sum to 1, shape (N, D).

    This is the projection in KL(mixture || target) on the mixtures within the limits. Floors must
    sum to at most 1, caps to at least 1.
    """
    target_ND = np.maximum(np.atleast_2d(target_ND), _TINY_SHARE)
    # The sum rises with c from that of the floors to that of the caps: bisection of log c. All
    # rows at once; 80 halvings of a range of 1382 end below the spacing of float64.
    low_N = np.full(len(target_ND), np.log(_TINY_SHARE))
    high_N = -low_N
    for _ in range(80):
        middle_N = (low_N + high_N) / 2
        total_N = np.clip(target_ND * np.exp(middle_N)[:, None], floor_D, cap_D).sum(axis=1)
        low_N = np.where(total_N < 1, middle_N, low_N)
        high_N = np.where(total_N < 1, high_N, middle_N)
    share_ND = np.clip(target_ND * np.exp(high_N)[:, None], floor_D, cap_D)
    # The upper end of the bracket never sums to less than 1; dividing removes the last rounding.
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

    Its parameters are concentration x D x prior: a uniform prior with concentration 1 makes all
    mixtures equally likely; larger values draw closer to the prior. The draw distributes the share
    that the floors leave, so floors do not distort it; a draw above a cap is projected on the caps.
    The first n of N runs are those of a design of n.

    Args:
        runs: Number of mixtures.
        prior_D: Mean of the draws, shape (D,).
        concentration: > 0.
        floor_D: Smallest shares, shape (D,).
        cap_D: Largest shares, shape (D,).
        seed: Seed of the draws.

    Raises:
        LawError: If the limits allow fewer distinct mixtures.
    """
    # The second number separates the streams of the designs: one seed would give equal draws.
    random = np.random.default_rng([seed, 1])
    alpha_D = np.maximum(concentration * prior_D.size * prior_D / prior_D.sum(), _MIN_ALPHA)
    return _distinct_draws(runs, lambda n: random.dirichlet(alpha_D, n), floor_D, cap_D)


def space_filling_design(runs: int, *, floor_D: Floats, cap_D: Floats, seed: int) -> Floats:
    """Return mixtures spread evenly over the allowed region, shape (N, D).

    Mixtures are chosen greedily from uniform candidates to minimize their energy distance to the
    candidates: kernel herding (Chen, Welling and Smola 2010) with the energy kernel, whose optimum
    are support points (Mak and Joseph 2018). Distances are between square roots of shares, so that
    small shares count. The first n of N runs fill the space too.

    Raises:
        LawError: If the limits allow fewer distinct mixtures.
    """
    share_CD = _candidates(runs, floor_D, cap_D, seed)
    root_CD = np.sqrt(share_CD)
    # Roots of shares have length 1, so |a - b|^2 = 2 - 2 a . b; rounding may take it below 0.
    squared_CC = 2 - 2 * root_CD @ root_CD.T
    distance_CC = np.sqrt(np.maximum(squared_CC, 0))
    chosen_distance_C = np.zeros(len(share_CD))
    mean_C = distance_CC.mean(axis=1)
    chosen: list[int] = []
    for step in range(runs):
        score_C = mean_C - chosen_distance_C / (step + 1)
        # Greedy herding may choose a candidate again; a second run of it adds little information.
        score_C[chosen] = np.inf
        chosen.append(int(score_C.argmin()))
        chosen_distance_C += distance_CC[chosen[-1]]
    return share_CD[chosen]


def d_optimal_design(
    runs: int,
    features: Callable[[Floats], Floats],
    *,
    floor_D: Floats,
    cap_D: Floats,
    seed: int,
) -> Floats:
    """Return the D-optimal mixtures for a model that is linear in features, shape (N, D).

    Maximizes log det(F'F + prior) over uniform candidates and the vertices, by Fedorov's exchange
    (1972) from a greedy start; the weak prior allows fewer runs than features.

    Args:
        runs: Number of mixtures.
        features: Maps shares (C, D) to features (C, P); they are standardized, an intercept added.
        floor_D: Smallest shares, shape (D,).
        cap_D: Largest shares, shape (D,).
        seed: Seed of the candidates.

    Raises:
        LawError: If the limits allow fewer distinct mixtures.
    """
    # Optimal points of a linear model are extreme, and uniform draws rarely come near a vertex.
    corners = vertices(floor_D, cap_D)
    share_CD = _unique_rows(np.vstack([_candidates(runs, floor_D, cap_D, seed), corners]))
    raw_CP = features(share_CD)
    spread_P = raw_CP.std(axis=0)
    scaled_CP = (raw_CP - raw_CP.mean(axis=0)) / np.where(spread_P > 0, spread_P, 1.0)
    feature_CP = np.hstack([np.ones((len(share_CD), 1)), scaled_CP])
    information_PP = _PRIOR_RUNS * np.eye(feature_CP.shape[1])
    chosen: list[int] = []
    for _ in range(runs):
        chosen.append(_most_informative(feature_CP, information_PP, chosen))
        information_PP += np.outer(feature_CP[chosen[-1]], feature_CP[chosen[-1]])
    for _ in range(_MAX_EXCHANGE_PASSES):
        if not _exchange(feature_CP, information_PP, chosen):
            break
    return share_CD[chosen]


def features_for(law: str) -> Callable[[Floats], Floats]:
    """Return the feature map for the D-optimal design of a law: (C, D) to (C, P).

    Laws with powers of shares (`bimix`, `additive`, `joint`, and `auto`, which may select them) are
    nearly linear in log shares; all others in the shares, of which the last is left out because
    shares sum to 1.
    """
    if law in ("bimix", "additive", "joint", "auto"):
        return lambda share_CD: np.log(np.maximum(share_CD, _RESOLUTION))
    return lambda share_CD: share_CD[:, :-1]


def vertices(floor_D: Floats, cap_D: Floats) -> Floats:
    """Return the mixtures with the largest allowed share of one domain each, shape (D, D)."""
    return within_limits(np.eye(floor_D.size) + _RESOLUTION, floor_D, cap_D)


def leave_one_out(prior_D: Floats, floor_D: Floats, cap_D: Floats) -> Floats:
    """Return the prior with one domain each reduced to its floor, shape (D, D)."""
    even_D = np.full(prior_D.size, 1 / prior_D.size)
    # Where the other priors are all 0 scaling up has no effect: a little of each is added.
    base_D = np.where(prior_D > 0, prior_D, _RESOLUTION * even_D)
    return within_limits(np.where(np.eye(prior_D.size) > 0, _TINY_SHARE, base_D), floor_D, cap_D)


def _candidates(runs: int, floor_D: Floats, cap_D: Floats, seed: int) -> Floats:
    random = np.random.default_rng([seed, 2])
    count = max(_MIN_CANDIDATES, _CANDIDATES_PER_RUN * runs)
    even_D = np.ones(floor_D.size)
    return _distinct_draws(
        count, lambda n: random.dirichlet(even_D, n), floor_D, cap_D, min_count=runs
    )


def _distinct_draws(
    count: int,
    draw: Callable[[int], Floats],
    floor_D: Floats,
    cap_D: Floats,
    *,
    min_count: int | None = None,
) -> Floats:
    """Return `count` distinct draws within the limits; `min_count` suffice if draws repeat."""
    share_ND = np.empty((0, floor_D.size))
    stalled_rounds = 0
    for _ in range(_MAX_ROUNDS):
        previous_count = len(share_ND)
        draw_ND = floor_D + (1 - floor_D.sum()) * draw(max(count, _MIN_DRAWS))
        above_cap_N = (draw_ND > cap_D).any(axis=1)
        draw_ND[above_cap_N] = within_limits(draw_ND[above_cap_N], floor_D, cap_D)
        # Appended, never re-sorted: a design of n runs is then the start of one of more.
        share_ND = _unique_rows(np.vstack([share_ND, draw_ND]))
        if len(share_ND) >= count:
            return share_ND[:count]
        # Under narrow caps most draws move to the same few mixtures, so new ones are rare.
        stalled_rounds = stalled_rounds + 1 if len(share_ND) == previous_count else 0
        if stalled_rounds == _MAX_STALLED_ROUNDS:
            break
    if min_count is not None and len(share_ND) >= min_count:
        return share_ND
    raise LawError.at(
        "runs",
        min_count or count,
        f"between the floors and caps only {len(share_ND)} different mixtures were found",
        fix="Widen the limits, or take fewer runs",
    )


def _unique_rows(share_ND: Floats) -> Floats:
    """Return the rows without repetitions, in order of first occurrence."""
    # np.unique sorts, so rows are taken by the sorted positions of their first occurrences.
    rounded_ND = np.round(share_ND / _RESOLUTION).astype(np.int64)
    _, first = np.unique(rounded_ND, axis=0, return_index=True)
    return share_ND[np.sort(first)]


def _most_informative(
    feature_CP: Floats, information_PP: NDArray[np.float64], excluded: list[int]
) -> int:
    """Return the candidate that raises the determinant most: by the factor 1 + f' M^-1 f."""
    gain_C = np.einsum("cp,pc->c", feature_CP, np.linalg.solve(information_PP, feature_CP.T))
    gain_C[excluded] = -np.inf
    return int(gain_C.argmax())


def _exchange(feature_CP: Floats, information_PP: NDArray[np.float64], chosen: list[int]) -> bool:
    """Exchange each run for the most informative candidate, in place; return whether any changed.

    `information_PP` is updated by rank-one terms.
    """
    changed = False
    for position, previous in enumerate(chosen):
        information_PP -= np.outer(feature_CP[previous], feature_CP[previous])
        candidate = _most_informative(
            feature_CP, information_PP, chosen[:position] + chosen[position + 1 :]
        )
        information_PP += np.outer(feature_CP[candidate], feature_CP[candidate])
        chosen[position] = candidate
        changed |= candidate != previous
    return changed
