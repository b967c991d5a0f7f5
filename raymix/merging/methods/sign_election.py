"""Sign election by mass and the mean over the tasks that agree, as DRM and TIES state them.

Per entry: s = sign of the tasks' sum; where the sum is exactly 0, s = the sign that most other
entries have; tasks of another sign do not count; the others' entries, times the task's
coefficient, are averaged over those that are not 0. Shapes: K tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def agreeing_mean(
    read: Callable[[int, slice], Tensor],
    chunks: Iterable[slice],
    out: Tensor,
    coefficient_K: Sequence[float],
    *,
    elect: bool = True,
) -> Tensor:
    """Fill `out` row by row with the mean over the tasks that agree, and return it.

    Args:
        read: Gives rows of task k; what it returns is not changed.
        chunks: The ranges of rows of `out`.
        out: The result, shape (rows, columns).
        coefficient_K: Factor of each task, applied after the election; 0 leaves a task out.
        elect: Whether signs are elected; if not, all tasks count wherever they are not 0.
    """
    undecided: list[slice] = []
    balance = 0.0
    for rows in chunks:
        x_K = [read(k, rows) for k in range(len(coefficient_K))]
        sign = _sign_of_sum(x_K) if elect else None
        if sign is not None:
            balance += float(sign.sum(dtype=torch.float64))
            # Entries that cancel exactly although a task has something there.
            if float(_magnitude(x_K).sign_().sub_(sign.abs()).sum()) > 0:
                undecided.append(rows)
        _mean(x_K, sign, coefficient_K, out[rows])
    majority = (balance > 0) - (balance < 0)
    for rows in undecided if majority else ():
        x_K = [read(k, rows) for k in range(len(coefficient_K))]
        sign = _sign_of_sum(x_K)
        _mean(x_K, sign.masked_fill_(sign == 0, majority), coefficient_K, out[rows])
    return out


def _sign_of_sum(x_K: Sequence[Tensor]) -> Tensor:
    total = x_K[0].clone()
    for x in x_K[1:]:
        total.add_(x)
    return total.sign_()


def _magnitude(x_K: Sequence[Tensor]) -> Tensor:
    total = x_K[0].abs()
    for x in x_K[1:]:
        total.add_(x.abs())
    return total


def _mean(
    x_K: Sequence[Tensor], sign: Tensor | None, coefficient_K: Sequence[float], out: Tensor
) -> None:
    """Write the mean of the tasks' entries that have the sign to `out`."""
    out.zero_()
    count = torch.zeros_like(out)
    for x, coefficient in zip(x_K, coefficient_K, strict=True):
        if coefficient == 0:
            continue
        if sign is None:
            out.add_(x, alpha=coefficient)
            count.add_(x.sign().abs_())
        else:
            agreeing = (x * sign).clamp_min_(0)
            out.add_(agreeing, alpha=coefficient)
            count.add_(agreeing.sign_())
    out.div_(count.clamp_min_(1))
    if sign is not None:
        out.mul_(sign)
