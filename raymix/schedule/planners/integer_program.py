"""A mixed-integer program, built row by row and solved by HiGHS through scipy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from raymix.schedule.layout import Floats, Ints


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found."""

    value: Floats
    """Every variable, in the order they were made."""
    objective: float
    bound: float
    """No solution is below this; equal to `objective`, to the gap, when it is optimal."""


class Program:
    """Minimize a linear function of variables >= 0 under linear rows."""

    def __init__(self) -> None:
        """Begin without variables and rows."""
        self._cost: list[Floats] = []
        self._upper: list[Floats] = []
        self._whole: list[Floats] = []
        self._size = 0
        self._rows: list[tuple[Ints, Floats]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def variables(
        self, count: int, *, upper: ArrayLike = np.inf, cost: float = 0.0, whole: bool = False
    ) -> Ints:
        """Return the positions of new variables between 0 and `upper`, shape (count,)."""
        self._cost.append(np.full(count, cost))
        self._upper.append(np.broadcast_to(np.asarray(upper, dtype=np.float64), (count,)))
        self._whole.append(np.full(count, float(whole)))
        self._size += count
        return np.arange(self._size - count, self._size)

    def row(
        self, at: Ints, values: ArrayLike, *, low: float = -np.inf, high: float = np.inf
    ) -> None:
        """Demand that the sum of `values` times the variables `at` lie between `low` and `high`."""
        given = np.asarray(values, dtype=np.float64)
        self._rows.append((at, np.broadcast_to(given, (len(at),))))
        self._low.append(low)
        self._high.append(high)

    def solve(self, *, gap: float, nodes: int) -> Solution | None:
        """Return the best solution, None if there is none or the limit came first.

        Ends by counting nodes of the search tree, not seconds, so that equal programs have equal
        solutions on any machine.

        Args:
            gap: Accepted distance to the bound, as a part of the objective.
            nodes: Most nodes of the search tree.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        indptr = np.cumsum([0, *(len(at) for at, _ in self._rows)])
        indices = np.concatenate([at for at, _ in self._rows])
        data = np.concatenate([values for _, values in self._rows])
        matrix = csr_matrix((data, indices, indptr), shape=(len(self._rows), self._size))
        found = milp(
            np.concatenate(self._cost),
            integrality=np.concatenate(self._whole),
            bounds=Bounds(0, np.concatenate(self._upper)),
            constraints=LinearConstraint(matrix, self._low, self._high),
            options={"mip_rel_gap": gap, "node_limit": nodes},
        )
        if found.x is None:
            return None
        bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
        return Solution(found.x, float(found.fun), float(bound))
