"""An objective made into arrays and checked; the shares that its limits allow.

Shapes: D domains, V targets, A of the domains (those that may have a share).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymix.errors import LawError, did_you_mean, format_problem, join_sentences
from raymix.laws.search.objective import Objective, as_array
from raymix.laws.table import Floats

SLACK = 1e-9
"""How far sums of floors, caps and priors may miss 1 through rounding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """The shares r with low <= r <= high that sum to 1; it is never empty."""

    low_A: Floats
    """Least shares, shape (A,)."""
    high_A: Floats
    """Largest shares, shape (A,)."""

    def vertex(self, cost_A: Floats) -> Floats:
        """Return the shares of least cost . r, shape (A,): the cheapest domains filled first."""
        order = np.argsort(cost_A, kind="stable")
        room = (self.high_A - self.low_A)[order]
        left = 1 - self.low_A.sum() - (np.cumsum(room) - room)
        share_A = self.low_A.copy()
        share_A[order] += np.clip(left, 0, room)
        return share_A

    def nearest(self, log_A: Floats) -> Floats:
        """Return clip(c exp(log), low, high) with the c that makes it sum to 1, shape (A,).

        These are the allowed shares nearest to exp(log) in relative entropy, and so what every
        entropic step ends in. Domains are fixed at a bound until the others keep theirs (Bitran
        and Hax 1981, "Disaggregation and resource allocation using convex knapsack problems with
        bounded variables"): no tolerance, a few passes.

        Args:
            log_A: Any shift of log shares, shape (A,), finite.
        """
        share_A = np.zeros(log_A.size)
        open_A = np.ones(log_A.size, dtype=np.bool_)
        while open_A.any():
            rest = 1 - share_A[~open_A].sum()
            part = np.exp(log_A[open_A] - log_A[open_A].max())
            part *= max(rest, 0.0) / part.sum()
            low, high = self.low_A[open_A], self.high_A[open_A]
            above, below = part - high, low - part
            surplus, lack = above[above > 0].sum(), below[below > 0].sum()
            share_A[open_A] = np.clip(part, low, high)
            if surplus == lack == 0:
                break
            fixed = above > 0 if surplus >= lack else below > 0
            if surplus == lack:
                fixed |= below > 0
            open_A[np.flatnonzero(open_A)[fixed]] = False
        return share_A

    def center(self, share_A: Floats) -> Floats:
        """Return allowed shares near to `share_A`, above 0 wherever that is allowed, shape (A,)."""
        inner = np.maximum(share_A, 1e-3 / share_A.size)
        return self.nearest(np.log(inner))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """An `Objective` in arrays, checked."""

    domains: tuple[str, ...]
    """The D domains."""
    targets: tuple[str, ...]
    """The V targets."""
    weight_V: Floats
    """Weights of the targets, >= 0, one at least above 0, shape (V,)."""
    horizon: float | None
    """Steps to be best at, > 0; None: the last of the table."""
    minimax: bool
    """Whether the largest weighted loss counts instead of their sum."""
    region: Region
    """The allowed shares of all D domains."""
    prior_D: Floats | None
    """Shares to stay near to, summing to 1, shape (D,)."""
    kl: float
    """Weight of KL(shares || prior), >= 0."""

    @property
    def counted_V(self) -> NDArray[np.bool_]:
        """Return which targets have a weight, shape (V,)."""
        return self.weight_V > 0

    def value(self, loss_V: Floats, share_D: Floats) -> float:
        """Return the objective at predicted losses, shape (V,), and shares, shape (D,)."""
        weighted = self.weight_V[self.counted_V] * loss_V[self.counted_V]
        return float(weighted.max() if self.minimax else weighted.sum()) + self.divergence(share_D)

    def divergence(self, share_D: Floats) -> float:
        """Return kl x KL(shares || prior) in nats."""
        if not self.kl or self.prior_D is None:
            return 0.0
        used = share_D > 0
        return self.kl * float((share_D[used] * np.log(share_D[used] / self.prior_D[used])).sum())


def feasible(objective: Objective, domains: Sequence[str], targets: Sequence[str]) -> Problem:
    """Return the objective in arrays over these domains and targets.

    Raises:
        LawError: If names, numbers or limits cannot be; all faults at once.
    """
    faults = _LimitFaults(tuple(domains), tuple(targets))
    weight_V = _weights(objective, faults)
    low_D, high_D = _limits(objective, faults)
    prior_D = _prior(objective, high_D, faults)
    if objective.horizon is not None and not 0 < objective.horizon < np.inf:
        faults.add("horizon", objective.horizon, "no length of a run", "Allowed: above 0")
    if not 0 <= objective.kl < np.inf:
        faults.add("kl", objective.kl, "no weight", "Allowed: a number of at least 0")
    if faults.found:
        raise LawError(*faults.found)
    return Problem(
        domains=faults.domains,
        targets=faults.targets,
        weight_V=weight_V,
        horizon=objective.horizon,
        minimax=objective.minimax,
        region=Region(low_A=low_D, high_A=high_D),
        prior_D=prior_D,
        kl=float(objective.kl),
    )


class _LimitFaults:
    """Collects what is wrong with an objective."""

    def __init__(self, domains: tuple[str, ...], targets: tuple[str, ...]) -> None:
        self.domains, self.targets = domains, targets
        self.found: list[str] = []

    def add(self, field: str, value: object, wrong: str, *advice: str) -> None:
        self.found.append(
            format_problem(f"objective.{field}", value, wrong, fix=join_sentences(*advice))
        )

    def checked(
        self,
        field: str,
        given: Mapping[str, float],
        allowed: Callable[[float], bool],
        advice: str,
        *,
        of: str = "domain",
    ) -> dict[str, float]:
        """Return the entries with a known name and an allowed value; note the others."""
        known = self.domains if of == "domain" else self.targets
        good: dict[str, float] = {}
        for name, value in given.items():
            if name not in known:
                listed = f"Known: {_some(known)}"
                near = did_you_mean(name, known)
                self.add(f"{field}.{name}", value, f"the law knows no such {of}", near, listed)
            elif not allowed(value):
                self.add(f"{field}.{name}", value, "not allowed", advice)
            else:
                good[name] = float(value)
        return good


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:20]) + (f" and {len(every) - 20} more" if len(every) > 20 else "")


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_finite(value: float) -> bool:
    return 0 <= value < np.inf


def _weights(objective: Objective, faults: _LimitFaults) -> Floats:
    if objective.weights is None:
        alike = 1.0 if objective.minimax else 1 / len(faults.targets)
        return np.full(len(faults.targets), alike)
    before = len(faults.found)
    advice = "Allowed: a finite number of at least 0"
    good = faults.checked("weights", objective.weights, _is_finite, advice, of="target")
    weight_V = as_array(good, faults.targets, 0.0)
    if not weight_V.any() and len(faults.found) == before:
        given = dict(objective.weights)
        faults.add("weights", given, "no target has a weight", "Give one at least above 0")
    return weight_V


def _limits(objective: Objective, faults: _LimitFaults) -> tuple[Floats, Floats]:
    """Return floors and caps, shape (D,) each, such that some shares keep both."""
    before = len(faults.found)
    advice = "Allowed: a share from 0 to 1"
    floors = faults.checked("floors", objective.floors, _is_share, advice)
    caps = faults.checked("caps", objective.caps, _is_share, advice)
    supplied = _supply_caps(objective, faults)
    low_D = as_array(floors, faults.domains, 0.0)
    supply_D = as_array(supplied, faults.domains, 1.0)
    high_D = np.minimum(as_array(caps, faults.domains, 1.0), supply_D)
    if len(faults.found) > before:
        return low_D, high_D
    for at in np.flatnonzero(low_D > high_D * (1 + SLACK)):
        name, cap = faults.domains[at], float(high_D[at])
        reason = "" if caps.get(name, 1.0) <= supply_D[at] else ", which max_epochs implies"
        advice = "Lower the floor or raise the cap"
        faults.add(f"floors.{name}", float(low_D[at]), f"above its cap {cap:.6g}{reason}", advice)
    least, most = float(low_D.sum()), float(high_D.sum())
    if least > 1 + SLACK:
        faults.add("floors", round(least, 6), "the floors sum to more than 1", "Lower them")
    if most < 1 - SLACK:
        advice = (
            "Raise max_epochs or caps, or train on fewer tokens" if supplied else "Raise the caps"
        )
        faults.add("caps", round(most, 6), "all caps together allow less than 1", advice)
    if least > 1:
        low_D = low_D / least
    if most < 1:
        high_D = high_D / (most or 1.0)
    return np.minimum(low_D, high_D), high_D


def _supply_caps(objective: Objective, faults: _LimitFaults) -> dict[str, float]:
    """Return the caps that `max_epochs` implies: max_epochs x available / total_tokens."""
    together = {
        "max_epochs": objective.max_epochs,
        "total_tokens": objective.total_tokens,
        "available_tokens": dict(objective.available_tokens) or None,
    }
    absent = [name for name, value in together.items() if value is None]
    if len(absent) == len(together):
        return {}
    before = len(faults.found)
    if absent:
        name = next(name for name, value in together.items() if value is not None)
        wrong = f"goes with {' and '.join(absent)}, not given"
        faults.add(name, together[name], wrong, "Give all three or none of them")
    for name in ("max_epochs", "total_tokens"):
        value = getattr(objective, name)
        if value is not None and not 0 < value < np.inf:
            faults.add(name, value, "not allowed", "Allowed: a finite number above 0")
    advice = "Allowed: a finite number of at least 0"
    good = faults.checked("available_tokens", objective.available_tokens, _is_finite, advice)
    if len(faults.found) > before or objective.max_epochs is None or not objective.total_tokens:
        return {}
    most = objective.max_epochs / objective.total_tokens
    return {name: min(1.0, most * tokens) for name, tokens in good.items()}


def _prior(objective: Objective, high_D: Floats, faults: _LimitFaults) -> Floats | None:
    if objective.prior is None:
        if objective.kl > 0:
            faults.add("kl", objective.kl, "there is no prior to stay near to", "Give a prior")
        return None
    before = len(faults.found)
    advice = "Allowed: a share from 0 to 1"
    good = faults.checked("prior", objective.prior, _is_share, advice)
    if len(faults.found) > before:
        return None
    prior_D = as_array(good, faults.domains, 0.0)
    total = float(prior_D.sum())
    if abs(total - 1) > 1e-6:
        given = round(total, 9)
        faults.add("prior", given, "the shares do not sum to 1", "Name every domain that has one")
        return None
    zero = np.flatnonzero((prior_D == 0) & (high_D > 0))
    if objective.kl > 0 and zero.size:
        name = faults.domains[zero[0]]
        wrong = "any share of it would be infinitely far from a prior of 0"
        faults.add(
            f"prior.{name}", 0.0, wrong, f"Give it a prior above 0, or a cap of 0 ({name}=0)"
        )
    return prior_D / total
