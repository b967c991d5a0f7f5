"""Validation of an objective, and the polytope of shares that its limits allow.

Shapes: D domains, V targets, A domains of a region (all D, or those with a cap above 0).
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
"""Tolerance of sums of floors, caps and priors, for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """The shares r with low <= r <= high that sum to 1; never empty."""

    low_A: Floats
    """Smallest shares, shape (A,)."""
    high_A: Floats
    """Largest shares, shape (A,)."""

    def vertex(self, cost_A: Floats) -> Floats:
        """Return argmin_r cost . r, shape (A,): a fractional knapsack, cheapest domains first."""
        # A stable sort: among equal costs the first domains are filled, on any platform.
        order = np.argsort(cost_A, kind="stable")
        capacity = (self.high_A - self.low_A)[order]
        remaining = 1 - self.low_A.sum() - (np.cumsum(capacity) - capacity)
        share_A = self.low_A.copy()
        share_A[order] += np.clip(remaining, 0, capacity)
        return share_A

    def project(self, log_A: Floats) -> Floats:
        """Return clip(c exp(log), low, high) with the c that makes it sum to 1, shape (A,).

        This is the projection of exp(log) in relative entropy, the last operation of an entropic
        step. Domains are fixed at a bound until the others respect theirs (Bitran and Hax 1981,
        "Disaggregation and resource allocation using convex knapsack problems with bounded
        variables"): no tolerance, a few passes.

        Args:
            log_A: Log shares up to a constant, shape (A,), finite.
        """
        share_A = np.zeros(log_A.size)
        open_A = np.ones(log_A.size, dtype=np.bool_)
        while open_A.any():
            rest = 1 - share_A[~open_A].sum()
            # Less the largest log: exp cannot overflow, and the sum is at least 1.
            part = np.exp(log_A[open_A] - log_A[open_A].max())
            part *= max(rest, 0.0) / part.sum()
            low, high = self.low_A[open_A], self.high_A[open_A]
            above, below = part - high, low - part
            surplus, lack = above[above > 0].sum(), below[below > 0].sum()
            share_A[open_A] = np.clip(part, low, high)
            if surplus == lack == 0:
                break
            # With more surplus above caps than lack below floors the clipped shares sum to too
            # little: c must rise, so domains above their caps stay there, and fixing them is final.
            # Likewise for floors; with both equal, c is right and the next pass only confirms it.
            fixed = above > 0 if surplus >= lack else below > 0
            if surplus == lack:
                fixed |= below > 0
            open_A[np.flatnonzero(open_A)[fixed]] = False
        return share_A

    def center(self, share_A: Floats) -> Floats:
        """Return allowed shares close to `share_A`, above 0 where caps are, shape (A,)."""
        # Entropic steps are multiplicative: a share that starts at 0 stays 0.
        inner = np.maximum(share_A, 1e-3 / share_A.size)
        return self.project(np.log(inner))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A validated `Objective` in arrays."""

    domains: tuple[str, ...]
    """The D domains."""
    targets: tuple[str, ...]
    """The V targets."""
    weight_V: Floats
    """Weights of the targets, >= 0, at least one above 0, shape (V,)."""
    horizon: float | None
    """Steps at which the losses are minimized, > 0; None: the last step of the table."""
    minimax: bool
    """Minimize the largest weighted loss instead of the sum."""
    region: Region
    """The allowed shares of all D domains."""
    prior_D: Floats | None
    """Prior shares, summing to 1, shape (D,)."""
    kl: float
    """Weight of KL(shares || prior), >= 0."""

    @property
    def active_V(self) -> NDArray[np.bool_]:
        """Return a mask of the targets with a weight above 0, shape (V,)."""
        return self.weight_V > 0

    def value(self, loss_V: Floats, share_D: Floats) -> float:
        """Return the objective at predicted losses, shape (V,), and shares, shape (D,)."""
        # Selected, not multiplied by 0: a target without a weight may be infinite or NaN.
        weighted = self.weight_V[self.active_V] * loss_V[self.active_V]
        return float(weighted.max() if self.minimax else weighted.sum()) + self.divergence(share_D)

    def divergence(self, share_D: Floats) -> float:
        """Return kl x KL(shares || prior) in nats."""
        if not self.kl or self.prior_D is None:
            return 0.0
        used = share_D > 0
        return self.kl * float((share_D[used] * np.log(share_D[used] / self.prior_D[used])).sum())


def feasible(objective: Objective, domains: Sequence[str], targets: Sequence[str]) -> Problem:
    """Return the validated objective in arrays over the domains and targets of a law.

    Raises:
        LawError: If names, numbers or limits are invalid; all faults at once.
    """
    faults = _LimitFaults(tuple(domains), tuple(targets))
    weight_V = _weights(objective, faults)
    low_D, high_D = _limits(objective, faults)
    prior_D = _prior(objective, high_D, faults)
    if objective.horizon is not None and not 0 < objective.horizon < np.inf:
        faults.add("horizon", objective.horizon, "not a number of steps", "Allowed: above 0")
    if not 0 <= objective.kl < np.inf:
        faults.add("kl", objective.kl, "not a weight", "Allowed: a number of at least 0")
    if faults.messages:
        raise LawError(*faults.messages)
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
    """Messages on invalid fields of an objective."""

    def __init__(self, domains: tuple[str, ...], targets: tuple[str, ...]) -> None:
        self.domains, self.targets = domains, targets
        self.messages: list[str] = []

    def add(self, field: str, value: object, problem: str, *fix: str) -> None:
        self.messages.append(
            format_problem(f"objective.{field}", value, problem, fix=join_sentences(*fix))
        )

    def checked(
        self,
        field: str,
        given: Mapping[str, float],
        allowed: Callable[[float], bool],
        fix: str,
        *,
        of: str = "domain",
    ) -> dict[str, float]:
        """Return the entries with a known name and an allowed value; add messages on the others."""
        known = self.domains if of == "domain" else self.targets
        valid: dict[str, float] = {}
        for name, value in given.items():
            if name not in known:
                listed = f"Known: {_name_list(known)}"
                suggestion = did_you_mean(name, known)
                self.add(
                    f"{field}.{name}", value, f"the law knows no such {of}", suggestion, listed
                )
            elif not allowed(value):
                self.add(f"{field}.{name}", value, "not allowed", fix)
            else:
                valid[name] = float(value)
        return valid


def _name_list(names: Iterable[str]) -> str:
    all_names = list(names)
    return ", ".join(all_names[:20]) + (
        f" and {len(all_names) - 20} more" if len(all_names) > 20 else ""
    )


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_weight(value: float) -> bool:
    return 0 <= value < np.inf


def _weights(objective: Objective, faults: _LimitFaults) -> Floats:
    if objective.weights is None:
        uniform = 1.0 if objective.minimax else 1 / len(faults.targets)
        return np.full(len(faults.targets), uniform)
    previous_count = len(faults.messages)
    fix = "Allowed: a finite number of at least 0"
    valid = faults.checked("weights", objective.weights, _is_weight, fix, of="target")
    weight_V = as_array(valid, faults.targets, 0.0)
    if not weight_V.any() and len(faults.messages) == previous_count:
        given = dict(objective.weights)
        faults.add("weights", given, "no target has a weight", "Give one at least above 0")
    return weight_V


def _limits(objective: Objective, faults: _LimitFaults) -> tuple[Floats, Floats]:
    """Return floors and caps, shape (D,) each, that allow at least one mixture."""
    previous_count = len(faults.messages)
    fix = "Allowed: a share from 0 to 1"
    floors = faults.checked("floors", objective.floors, _is_share, fix)
    caps = faults.checked("caps", objective.caps, _is_share, fix)
    epoch_caps = _epoch_caps(objective, faults)
    low_D = as_array(floors, faults.domains, 0.0)
    epoch_cap_D = as_array(epoch_caps, faults.domains, 1.0)
    high_D = np.minimum(as_array(caps, faults.domains, 1.0), epoch_cap_D)
    if len(faults.messages) > previous_count:
        return low_D, high_D
    for d in np.flatnonzero(low_D > high_D * (1 + SLACK)):
        name, cap = faults.domains[d], float(high_D[d])
        reason = "" if caps.get(name, 1.0) <= epoch_cap_D[d] else ", which max_epochs implies"
        fix = "Lower the floor or raise the cap"
        faults.add(f"floors.{name}", float(low_D[d]), f"above its cap {cap:.6g}{reason}", fix)
    floor_sum, cap_sum = float(low_D.sum()), float(high_D.sum())
    if floor_sum > 1 + SLACK:
        faults.add("floors", round(floor_sum, 6), "the floors sum to more than 1", "Lower them")
    if cap_sum < 1 - SLACK:
        fix = (
            "Raise max_epochs or caps, or train on fewer tokens" if epoch_caps else "Raise the caps"
        )
        faults.add("caps", round(cap_sum, 6), "all caps together allow less than 1", fix)
    # Sums within SLACK of 1 pass: scaled to exactly 1, so that the region is not empty by 1e-16.
    if floor_sum > 1:
        low_D = low_D / floor_sum
    if cap_sum < 1:
        high_D = high_D / (cap_sum or 1.0)
    return np.minimum(low_D, high_D), high_D


def _epoch_caps(objective: Objective, faults: _LimitFaults) -> dict[str, float]:
    """Return the caps implied by `max_epochs`: max_epochs x available / total_tokens."""
    fields = {
        "max_epochs": objective.max_epochs,
        "total_tokens": objective.total_tokens,
        "available_tokens": dict(objective.available_tokens) or None,
    }
    missing = [name for name, value in fields.items() if value is None]
    if len(missing) == len(fields):
        return {}
    previous_count = len(faults.messages)
    if missing:
        name = next(name for name, value in fields.items() if value is not None)
        problem = f"goes with {' and '.join(missing)}, not given"
        faults.add(name, fields[name], problem, "Give all three or none of them")
    for name in ("max_epochs", "total_tokens"):
        value = getattr(objective, name)
        if value is not None and not 0 < value < np.inf:
            faults.add(name, value, "not allowed", "Allowed: a finite number above 0")
    fix = "Allowed: a finite number of at least 0"
    valid = faults.checked("available_tokens", objective.available_tokens, _is_weight, fix)
    if (
        len(faults.messages) > previous_count
        or objective.max_epochs is None
        or not objective.total_tokens
    ):
        return {}
    share_per_token = objective.max_epochs / objective.total_tokens
    return {name: min(1.0, share_per_token * tokens) for name, tokens in valid.items()}


def _prior(objective: Objective, high_D: Floats, faults: _LimitFaults) -> Floats | None:
    if objective.prior is None:
        if objective.kl > 0:
            faults.add("kl", objective.kl, "there is no prior to stay near to", "Give a prior")
        return None
    previous_count = len(faults.messages)
    fix = "Allowed: a share from 0 to 1"
    valid = faults.checked("prior", objective.prior, _is_share, fix)
    if len(faults.messages) > previous_count:
        return None
    prior_D = as_array(valid, faults.domains, 0.0)
    total = float(prior_D.sum())
    if abs(total - 1) > 1e-6:
        given = round(total, 9)
        faults.add("prior", given, "the shares do not sum to 1", "Name every domain that has one")
        return None
    # KL(r || prior) is infinite for any r > 0 where the prior is 0, and finite for r = 0.
    zero = np.flatnonzero((prior_D == 0) & (high_D > 0))
    if objective.kl > 0 and zero.size:
        name = faults.domains[zero[0]]
        problem = "any share of it would be infinitely far from a prior of 0"
        faults.add(
            f"prior.{name}", 0.0, problem, f"Give it a prior above 0, or a cap of 0 ({name}=0)"
        )
    return prior_D / total
