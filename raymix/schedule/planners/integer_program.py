"""A mixed-integer linear program, built row by row and solved by HiGHS through scipy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from raymix.schedule.layout import Floats, Ints


@dataclass(frozen=True, slots=True)
class Solution:
    """A feasible solution and its objective bound."""

    value: Floats
    """Every variable, in the order of creation."""
    objective: float
    bound: float
    """Lower bound of all solutions; within the gap of `objective` when that is optimal."""


class IntegerProgram:
    """Minimize a linear function of variables >= 0 under linear constraints."""

    def __init__(self) -> None:
        """Start without variables and constraints."""
        self._cost: list[Floats] = []
        self._upper: list[Floats] = []
        self._integrality: list[Floats] = []
        self._n_variables = 0
        self._rows: list[tuple[Ints, Floats]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add_variables(
        self, count: int, *, upper: ArrayLike = np.inf, cost: float = 0.0, integer: bool = False
    ) -> Ints:
        """Return the indices of new variables between 0 and `upper`, shape (count,)."""
        self._cost.append(np.full(count, cost))
        self._upper.append(np.broadcast_to(np.asarray(upper, dtype=np.float64), (count,)))
        self._integrality.append(np.full(count, float(integer)))
        self._n_variables += count
        return np.arange(self._n_variables - count, self._n_variables)

    def add_constraint(
        self, index: Ints, coefficients: ArrayLike, *, low: float = -np.inf, high: float = np.inf
    ) -> None:
        """Require `low` <= sum of `coefficients` times the variables `index` <= `high`."""
        row = np.asarray(coefficients, dtype=np.float64)
        self._rows.append((index, np.broadcast_to(row, (len(index),))))
        self._low.append(low)
        self._high.append(high)

    def solve(self, *, gap: float, max_nodes: int) -> Solution | None:
        """Return the best solution, or None if none exists or the limit was reached before one.

        Args:
            gap: Relative gap between objective and bound at which the search ends.
            max_nodes: Nodes of the branch-and-bound tree at which the search ends.
        """
        # Here, as scipy.optimize is slow to import and only two planners need it.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        # Sparse: a row names a few of thousands of variables.
        indptr = np.cumsum([0, *(len(index) for index, _ in self._rows)])
        indices = np.concatenate([index for index, _ in self._rows])
        data = np.concatenate([coefficients for _, coefficients in self._rows])
        shape = (len(self._rows), self._n_variables)
        result = milp(
            np.concatenate(self._cost),
            integrality=np.concatenate(self._integrality),
            bounds=Bounds(0, np.concatenate(self._upper)),
            constraints=LinearConstraint(
                csr_matrix((data, indices, indptr), shape=shape), self._low, self._high
            ),
            # A limit in nodes and not in seconds: equal programs have equal solutions on any
            # machine.
            options={"mip_rel_gap": gap, "node_limit": max_nodes},
        )
        if result.x is None:
            return None
        # scipy gives no bound for a program without integer variables.
        bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
        return Solution(result.x, float(result.fun), float(bound))
